"""Copies of a model that share experts, two ranks each: alone, with tiers below the pool, and as halves of pairs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hicache_servers import PATIENT, PROMPT_TOKENS, Answer, CachedServer, prompt
from pd_servers import couple
from ranked_answers import BODIES, answers
from tiny_folder import write_tiny_folder

from moonlang.models import deepseek_v3

APART = ("--enable-dp-attention", "--moe-a2a-backend", "mooncake")
FOUR = (*APART, "--tp-size", "4", "--dp-size", "2")
TWO = (*APART, "--tp-size", "2", "--dp-size", "2")
PLAIN = ("--constrained-json-disable-any-whitespace", *PATIENT)
ENDLESS = {"max_new_tokens": 3000, "ignore_eos": True}
MOST = PROMPT_TOKENS - 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """DeepSeek-V3 in shape, with bytes for tokens."""
    changes = {"vocab_size": 258, "max_position_embeddings": 4096, "eos_token_id": 257}
    folder = write_tiny_folder(tmp_path_factory.mktemp("deepseek"), **deepseek_v3.tiny() | changes)
    return ("--model-path", str(folder), "--load-format", "dummy", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def alone(model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CachedServer]:
    """One rank, with a store."""
    folder = tmp_path_factory.mktemp("store")
    with CachedServer(folder, *PLAIN, *model, backend="file", extra={"directory": str(folder / "pages")}) as server:
        yield server


@pytest.fixture(scope="module")
def copies(
    alone: CachedServer, model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CachedServer]:
    """Two copies, on the same store."""
    folder = tmp_path_factory.mktemp("copies")
    with CachedServer(folder, *PLAIN, *model, *FOUR, backend="file", extra=alone.extra) as server:
        yield server


def settle(server: CachedServer) -> None:
    """Until nothing is on its way in any copy."""
    server.until(lambda: not any(load["tiers"][way] for load in server.loads() for way in ("fetching", "queued_pages")))  # type: ignore[index]


def ask(server: CachedServer, seed: int, copy: int) -> Answer:
    return server.ask(prompt(seed), routed_dp_rank=copy)


@pytest.mark.parametrize("name", BODIES)
def test_every_copy_answers_as_one_rank(alone: CachedServer, copies: CachedServer, name: str) -> None:
    """Greedy and drawn, log probabilities of the prompt, penalties, a grammar."""
    expected = answers(alone, BODIES[name])
    asked = [{**BODIES[name], "routed_dp_rank": copy} for copy in (0, 1)]
    assert [answers(copies, body) for body in asked] == [expected] * 2  # the other one idles
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda body: answers(copies, body), asked * 2)) == [expected] * 4


def test_one_copy_has_much_to_do_and_the_other_little(alone: CachedServer, copies: CachedServer) -> None:
    """Requests come and go, some by abort, while the other copy has long prompts."""
    expected = answers(alone, BODIES["plain"])
    with ThreadPoolExecutor(6) as pool:
        endless = {"text": "x", "rid": "endless", "sampling_params": ENDLESS, "routed_dp_rank": 1}
        held = pool.submit(copies.http.post, "/generate", json=endless)
        found = [pool.submit(answers, copies, {**BODIES["plain"], "routed_dp_rank": n % 2}) for n in range(8)]
        assert [one.result() for one in found] == [expected] * 8
        copies.http.post("/abort_request", json={"rid": "endless"})
        assert held.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    copies.wait_idle()


def test_copies_find_in_the_store_what_others_wrote(alone: CachedServer, copies: CachedServer) -> None:
    """A server of one rank wrote it, or the other copy."""
    cold = alone.ask(prompt(1))
    alone.settle()
    for copy in (0, 1):
        found = ask(copies, 1, copy)
        assert (found.details["storage"], found.same(cold)) == (MOST, True)
    cold = ask(copies, 2, 0)
    settle(copies)
    found = ask(copies, 2, 1)
    assert (found.details["storage"], found.same(cold)) == (MOST, True)
    found = alone.ask(prompt(2))
    assert (found.details["storage"], found.same(cold)) == (MOST, True)


def test_every_copy_has_a_host_pool_of_its_own(copies: CachedServer) -> None:
    cold = ask(copies, 3, 1)
    settle(copies)
    for seed in range(100, 108):  # more than the device pool of a copy holds
        ask(copies, seed, 1)
    settle(copies)
    found = ask(copies, 3, 1)
    assert (found.details["host"], found.same(cold)) == (MOST, True)


def test_a_pair_of_copies(alone: CachedServer, model: tuple[str, ...], tmp_path: Path) -> None:
    """The room says which prefill copy has a request; decode copies, of one rank each, take turns."""
    expected = [one[:2] for one in answers(alone, BODIES["greedy"])]
    with couple(tmp_path, "mooncake", *model, prefill=FOUR, decode=TWO) as both:
        for prefill, decode in [both.submit(BODIES["greedy"]) for _ in range(4)]:
            assert (prefill.result().status_code, decode.result().status_code) == (200, 200), decode.result().text
            found = decode.result().json()
            assert [(found["output_ids"], found["meta_info"]["output_token_logprobs"])] == expected
        for server in (both.prefill, both.decode):
            assert [load["pairs"]["total_moved"] for load in server.loads()] == [2, 2]  # type: ignore[index]
        both.wait_free()


def test_a_rank_that_only_computes_is_lost(copies: CachedServer) -> None:
    """The last test of this server, in the middle of a request."""
    run = copies.run_directory()
    body = {"text": "x", "stream": True, "sampling_params": ENDLESS, "routed_dp_rank": 0}
    with copies.http.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
        os.kill(copies.roles()["worker-3"], signal.SIGKILL)
        assert copies.process.wait(60) == 1
    assert "The worker-3 was killed by SIGKILL" in copies.log
    assert not run.exists()
    assert not list(Path("/dev/shm").glob(f"{run.name}*"))
