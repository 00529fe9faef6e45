"""A real server over each messaging backend: the same answer, and of zmq nothing where it was not chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import write_tiny_folder
from watched_server import WatchedServer, watched_server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("model"))


def libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def listening(server: WatchedServer) -> list[int]:
    """TCP ports that the server's processes listen on."""
    inodes = set()
    for pid in (server.process.pid, *server.roles().values()):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes})


@pytest.mark.parametrize("backend", ["mooncake", "zmq"])
def test_only_the_chosen_backend_is_there(model: Path, backend: str) -> None:
    with watched_server("--model-path", str(model), "--load-format", "dummy", "--messaging-backend", backend) as server:
        server.wait_ready()
        body = {"text": "x", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        status, answer = server.post("/generate", body)
        assert (status, answer["meta_info"]["completion_tokens"]) == (200, 4)
        pids = (server.process.pid, *server.roles().values())
        assert len(pids) == 3
        for pid in pids:
            found = libraries(pid)
            assert ("zmq" in found) == (backend == "zmq")
            assert ("memfd:moonlang" in found) == (backend == "mooncake")
        assert listening(server) == [server.port]
