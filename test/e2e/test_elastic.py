"""--elastic-ep-backend mooncake: ranks that are killed, under load and without. All streams end right."""

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

PLAIN = (*("--dtype", "bfloat16", "--max-total-tokens", "8000"), *("--random-seed", "1", "--grammar-backend", "none"))
FLAGS = ("--tp-size", "4", "--moe-a2a-backend", "mooncake", "--elastic-ep-backend", "mooncake", *PLAIN)
STREAMS, TOKENS = 6, 160


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
        stream.join(150)
        assert not stream.is_alive()
        assert stream.finish == {"type": "length", "length": TOKENS}
    return [stream.tokens for stream in all_of_them]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_folder(tmp_path_factory.mktemp("mixtral"))
    write_checkpoint(made, specs()["mixtral"].tiny() | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257})
    return made


def test_ranks_of_one_model_killed_one_after_another(folder: Path, tmp_path: Path) -> None:
    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS) as server:
        undisturbed = ended(streams(server))
        running = streams(server)
        server.until(lambda: all(len(stream.tokens) > TOKENS // 4 for stream in running))
        os.kill(server.roles()["worker-1"], signal.SIGKILL)
        assert ended(running) == undisturbed
        server.until(lambda: server.log.count("2 of 4 ranks compute on") == 1)
        assert "worker-3] This rank is not needed" in server.log

        os.kill(server.roles()["worker-2"], signal.SIGKILL)  # nobody asks anything: the others notice nevertheless
        server.until(lambda: server.log.count("2 of 4 ranks compute on") == 2)
        assert ended(streams(server)) == undisturbed

        os.kill(server.roles()["worker-3"], signal.SIGKILL)
        server.until(lambda: "1 of 4 ranks compute on" in server.log)
        assert ended(streams(server)) == undisturbed
        server.wait_idle()


def test_a_copy_that_shares_nothing_killed(folder: Path, tmp_path: Path) -> None:
    flags = ("--dp-size", "2", "--elastic-ep-backend", "mooncake", "--tokenizer-worker-num", "2", *PLAIN)
    with LiveServer(tmp_path, "--model-path", str(folder), *flags) as server:
        undisturbed = ended(streams(server))
        running = streams(server)
        server.until(lambda: all(len(stream.tokens) > TOKENS // 4 for stream in running))
        os.kill(server.roles()["scheduler-1"], signal.SIGKILL)
        assert ended(running) == undisturbed
        assert ended(streams(server)) == undisturbed


SHARING = ("--tp-size", "4", "--dp-size", "4", "--enable-dp-attention", "--moe-a2a-backend", "mooncake")


def test_copies_that_share_experts_killed_one_after_another(folder: Path, tmp_path: Path) -> None:
    flags = (*SHARING, "--elastic-ep-backend", "mooncake", "--enable-metrics", *PLAIN)
    with LiveServer(tmp_path, "--model-path", str(folder), *flags) as server:
        undisturbed = ended(streams(server))
        running = streams(server)
        server.until(lambda: all(len(stream.tokens) > TOKENS // 4 for stream in running))
        os.kill(server.roles()["scheduler-2"], signal.SIGKILL)
        assert ended(running) == undisturbed
        server.until(lambda: server.log.count("] 3 replicas go on") == 3)

        os.kill(server.roles()["scheduler"], signal.SIGKILL)  # nobody asks anything: the others notice nevertheless
        server.until(lambda: server.log.count("] 2 replicas go on") == 2)
        assert ended(streams(server)) == undisturbed
