"""Servers of several ranks answer as one of one rank does, bit for bit."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, free_port
from pd_servers import couple

STORY = "The old man and the sea. Once upon a time there was a fisherman who had caught nothing for many days. "
FLAGS = ("--max-total-tokens", "20000", "--random-seed", "1", "--constrained-json-disable-any-whitespace")
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}


def sampled(text: str | list[str], **params: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 24, **params}, **LOGPROBS}


BODIES = {
    "greedy": sampled(STORY * 3, temperature=0),
    "seeded": sampled([STORY, "Hi"], temperature=1.0, sampling_seed=7, top_p=0.9, ignore_eos=True),
    "plain": {"text": ["The", STORY * 9], "sampling_params": {"temperature": 0, "max_new_tokens": 24}},
    "penalties": sampled(STORY, temperature=0, frequency_penalty=0.6, presence_penalty=0.3),
    "grammar": sampled("A number: ", temperature=0, regex="[0-9]{3}-[a-f]{2}"),
}


def answers(server: LiveServer, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    return [
        (one["output_ids"], one["meta_info"].get("output_token_logprobs"), one["meta_info"].get("input_top_logprobs"))
        for one in (found if isinstance(found, list) else [found])
    ]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("ranks"), *FLAGS, "--tp-size", str(request.param)) as running:
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_the_same_bits(server: LiveServer, ranks: LiveServer, name: str) -> None:
    assert answers(ranks, BODIES[name]) == answers(server, BODIES[name])


def free_ports() -> int:
    """The first of two neighbouring ports that nobody listens on."""
    while True:
        first = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
        return first


def worker_of(server: LiveServer) -> int:
    """Some rank but the first."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return next(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("moonlang::worke"))


def test_a_lost_rank_ends_the_server(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--tp-size", "2") as running:
        os.kill(worker_of(running), signal.SIGKILL)
        assert running.process.wait(20) != 0
        assert "worker-1 was killed by SIGKILL" in running.log
    assert not list(Path("/dev/shm").glob("moonlang-run-*-ranks"))


def test_an_orderly_end_is_quiet(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--tp-size", "2") as running:
        answers(running, BODIES["greedy"])
        running.process.terminate()
        running.process.wait(20)
        assert "Traceback" not in running.log


@pytest.mark.parametrize(("size", "why"), [("3", "1, 2, 4 or 8"), ("8", "attention heads")])
def test_models_that_cannot_be_shared(size: str, why: str, tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--tp-size", size)
    try:
        assert server.process.wait(60) == 2
        assert why in server.log
    finally:
        server.close()


def test_ranks_on_two_nodes(server: LiveServer, tmp_path: Path) -> None:
    """The second node ends with the first."""
    nodes = ("--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_ports()}")
    follower = LiveServer(tmp_path, *FLAGS, *nodes, "--node-rank", "1")
    try:
        with LiveServer(tmp_path, *FLAGS, *nodes) as running:
            for name in ("greedy", "seeded"):
                assert answers(running, BODIES[name]) == answers(server, BODIES[name])
        assert follower.process.wait(20) == 1
        assert "Rank 0 has ended" in follower.log
    finally:
        follower.close()


@pytest.mark.parametrize(("prefill", "decode"), [("1", "2"), ("2", "1")])
def test_pairs_of_unequal_ranks(server: LiveServer, prefill: str, decode: str, tmp_path: Path) -> None:
    one, other = ("--tp-size", prefill, "--chunked-prefill-size", "64"), ("--tp-size", decode)
    with couple(tmp_path, "local", prefill=one, decode=other) as both:
        for body in BODIES.values():
            response: httpx.Response = both.ask(body if isinstance(body["text"], str) else {**body, "text": STORY})
            assert response.status_code == 200, response.text
            found = response.json()
            single = {**body, "text": body["text"] if isinstance(body["text"], str) else STORY}
            ((ids, logprobs, _),) = answers(server, single)
            assert (found["output_ids"], found["meta_info"].get("output_token_logprobs")) == (ids, logprobs)
        both.wait_free()
