"""--elastic-ep-backend mooncake: a rank that is killed under load. All streams end right, and soon."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from live_server import LiveServer
from tiny_folder import write_tiny_folder

from moonlang.base import clock
from moonlang.models.registry import specs

FLAGS = (
    *("--tp-size", "2", "--moe-a2a-backend", "mooncake", "--elastic-ep-backend", "mooncake", "--dtype", "bfloat16"),
    *("--max-total-tokens", "8000", "--random-seed", "1", "--grammar-backend", "none"),
)
STREAMS, TOKENS = 6, 160
SOON_S = 10.0  # 2 s on a quiet machine


def body(number: int) -> dict[str, Any]:
    """Half of them greedy, half of them drawn from a seed."""
    sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
    chosen = {"temperature": 0} if number % 2 else {"temperature": 0.9, "sampling_seed": number}
    return {"text": f"Story {number}: once upon a time", "stream": True, "sampling_params": sampling | chosen}


class Stream(threading.Thread):
    """Reads one stream: its tokens, and when they came."""

    def __init__(self, server: LiveServer, number: int) -> None:
        super().__init__(daemon=True)
        self._server, self._number = server, number
        self.tokens: list[int] = []
        self.times_ns: list[int] = []
        self.finish: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        with self._server.http.stream("POST", "/generate", json=body(self._number)) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                self.tokens = chunk["output_ids"]
                self.times_ns.append(clock.monotonic_ns())
                self.finish = chunk["meta_info"]["finish_reason"]


def streams(server: LiveServer) -> list[Stream]:
    return [Stream(server, number) for number in range(STREAMS)]


def ended(all_of_them: list[Stream]) -> list[list[int]]:
    for stream in all_of_them:
        stream.join(60)
        assert not stream.is_alive()
        assert stream.finish == {"type": "length", "length": TOKENS}
    return [stream.tokens for stream in all_of_them]


def worker_of(server: LiveServer) -> int:
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return next(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("moonlang::worke"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_folder(tmp_path_factory.mktemp("mixtral"))
    write_checkpoint(made, specs()["mixtral"].tiny() | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257})
    return made


def test_a_rank_killed_under_load(folder: Path, tmp_path: Path) -> None:
    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS) as server:
        undisturbed = ended(streams(server))
        running = streams(server)
        server.until(lambda: all(len(stream.tokens) > TOKENS // 4 for stream in running))
        os.kill(worker_of(server), signal.SIGKILL)
        killed_ns = clock.monotonic_ns()
        assert ended(running) == undisturbed
        back_s = min(time for stream in running for time in stream.times_ns if time > killed_ns + 50 * clock.NS_PER_MS)
        assert (back_s - killed_ns) / clock.NS_PER_S < SOON_S
        assert "Rank 0 goes on alone" in server.log
        assert ended(streams(server)) == undisturbed
        server.wait_idle()
