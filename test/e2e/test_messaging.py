"""A real server over each messaging backend: the same answer, and of zmq nothing where it was not chosen."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq
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
            with contextlib.suppress(FileNotFoundError):  # closed by now
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes})


def test_what_the_prefix_tree_holds_is_published(model: Path, tmp_path: Path) -> None:
    config = {"publisher": "zmq", "endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}
    flags = ("--load-format", "dummy", "--page-size", "4", "--kv-events-config", json.dumps(config))
    with watched_server("--model-path", str(model), *flags) as server, zmq.Context() as context:
        server.wait_ready()
        body = {"input_ids": list(range(10, 22)), "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        assert server.post("/generate", body)[0] == 200
        assert httpx.post(f"http://127.0.0.1:{server.port}/flush_cache?timeout=60", timeout=90).status_code == 200
        with context.socket(zmq.DEALER) as asker:
            asker.set(zmq.RCVTIMEO, 60_000)
            asker.connect(config["replay_endpoint"])
            removed = False
            while not removed:
                asker.send_multipart((b"", bytes(8)))
                events: list[dict[str, Any]] = []
                while payload := asker.recv_multipart()[2]:
                    events += msgspec.msgpack.decode(payload)[1]
                removed = any(event["type"] == "BlockRemoved" for event in events)
        stored = [event for event in events if event["type"] == "BlockStored"]
        mine = next(event for event in stored if event["token_ids"][:12] == body["input_ids"])
        assert mine["block_size"] == 4
        assert mine["parent_block_hash"] is None
        gone = {block for event in events if event["type"] == "BlockRemoved" for block in event["block_hashes"]}
        assert gone == {block for event in stored for block in event["block_hashes"]}


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
