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

from moonlang.models.registry import specs

PLAIN = (*("--dtype", "bfloat16", "--max-total-tokens", "8000"), *("--random-seed", "1", "--grammar-backend", "none"))
FLAGS = ("--tp-size", "4", "--moe-a2a-backend", "mooncake", "--elastic-ep-backend", "mooncake", *PLAIN)
STREAMS, TOKENS = 6, 160


def body(number: int) -> dict[str, Any]:
    """Half of them greedy, half of them drawn from a seed; some with log probabilities, with a stop string that never
    comes, or answered in one piece."""
    sampling: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
    sampling |= {"temperature": 0} if number % 2 else {"temperature": 0.9, "sampling_seed": number}
    if number in (2, 3):
        sampling |= {"stop": ["never said"], "frequency_penalty": 0.5}
    more = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2} if number in (3, 4) else {}
    return {"text": f"Story {number}: once upon a time", "stream": number != 5, "sampling_params": sampling, **more}


class Stream(threading.Thread):
    """Reads the answer to request `number`: how many tokens there are so far, and all that is said of them."""

    def __init__(self, server: LiveServer, number: int) -> None:
        super().__init__(daemon=True)
        self._server, self._number = server, number
        self.count = 0
        self.answer: list[Any] = []
        self.finish: dict[str, Any] | None = None
        self.start()

    @property
    def going(self) -> bool:
        """Whether a part of the answer is there, if it comes in parts."""
        return self.count > TOKENS // 4 or not body(self._number)["stream"]

    def run(self) -> None:
        asked = body(self._number)
        with self._server.http.stream("POST", "/generate", json=asked) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") or not asked["stream"]:
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, said: dict[str, Any]) -> None:
        meta = said["meta_info"]
        self.count = len(said["output_ids"])
        self.answer = [said["text"], said["output_ids"]]
        self.answer += [meta.get(f"{part}_token_logprobs") for part in ("input", "output")]
        self.finish = meta["finish_reason"]


def streams(server: LiveServer) -> list[Stream]:
    return [Stream(server, number) for number in range(STREAMS)]


def under_way(server: LiveServer) -> list[Stream]:
    """Requests of which every one has said something."""
    running = streams(server)
    server.until(lambda: all(stream.going for stream in running))
    return running


def ended(all_of_them: list[Stream]) -> list[list[Any]]:
    for stream in all_of_them:
        stream.join(150)
        assert not stream.is_alive()
        assert stream.finish == {"type": "length", "length": TOKENS}
    return [stream.answer for stream in all_of_them]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_folder(tmp_path_factory.mktemp("mixtral"))
    write_checkpoint(made, specs()["mixtral"].tiny() | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257})
    return made


def test_ranks_of_one_model_killed_one_after_another(folder: Path, tmp_path: Path) -> None:
    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS) as server:
        undisturbed = ended(streams(server))
        running = under_way(server)
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
        running = under_way(server)
        os.kill(server.roles()["scheduler-1"], signal.SIGKILL)
        assert ended(running) == undisturbed
        assert ended(streams(server)) == undisturbed


def test_copies_that_share_experts_killed_until_none_is_left(folder: Path, tmp_path: Path) -> None:
    shared = ("--tp-size", "4", "--dp-size", "4", "--enable-dp-attention", "--moe-a2a-backend", "mooncake")
    flags = (*shared, "--ep-num-redundant-experts", "2", "--elastic-ep-backend", "mooncake", "--enable-metrics", *PLAIN)
    with LiveServer(tmp_path, "--model-path", str(folder), *flags) as server:
        undisturbed = ended(streams(server))
        os.kill(server.roles()["scheduler-2"], signal.SIGKILL)  # nobody asks anything: the others notice nevertheless
        server.until(lambda: server.log.count("] 3 of the replicas go on") == 3)
        seen_from_outside(server)

        running = under_way(server)
        roles = server.roles()
        for role in ("scheduler", "scheduler-3"):  # at once
            os.kill(roles[role], signal.SIGKILL)
        assert ended(running) == undisturbed
        server.until(lambda: "] 1 of the replicas go on" in server.log)
        server.wait_idle()

        os.kill(server.roles()["scheduler-1"], signal.SIGKILL)
        assert server.process.wait(60) == 1


def seen_from_outside(server: LiveServer) -> None:
    """What a server says that has lost its copy number 2."""
    assert server.http.get("/health").status_code == 200
    loads = server.http.get("/v1/loads").json()
    assert [load["dp_rank"] for load in loads["loads"]] == [0, 1, 3]
    assert loads["lost"] == ["scheduler-2"]
    metrics = server.http.get("/metrics").text.splitlines()
    assert next(line for line in metrics if line.startswith("moonlang:lost_ranks")).endswith(" 1.0")
    refused = server.http.post("/generate", json=body(5) | {"routed_dp_rank": 2})
    assert refused.status_code == 503
    assert "Replica 2 is lost" in refused.text
