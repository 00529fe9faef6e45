"""Halves of a pair that are stopped or killed: every client gets its answer or a clear error, no page is lost.

Without a router, which would try again: see test_router for what clients of one see.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from pd_servers import Couple, PdServer, couple, seconds_since

from moonlang.base import clock

NOTICED_S = 30  # a second, and the rest for a busy machine; a tenth of the time that a request waits for its pages
PATIENCE_S = 90
BODY = {"text": "Once upon a time there was " * 12, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
LONG = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Couple]:
    with couple(tmp_path_factory.mktemp("pair"), "local") as both:
        yield both


@pytest.fixture
def expected(pair: Couple) -> list[int]:
    """What the answer is on a good day."""
    return pair.ask(BODY).json()["output_ids"]


def numbered(number: int, times: int = 1) -> dict[str, Any]:
    """A prompt of its own, so that no cache knows it."""
    return {**BODY, "text": f"{number}: {BODY['text'] * times}"}


def in_transit(server: PdServer) -> int:
    """Requests that wait for their peer, or for pages of it."""
    pairs = server.pairs()
    return pairs["num_pairing"] + pairs["num_moving"]


def assert_well(pair: Couple, expected: list[int]) -> None:
    """No page is lost, and as soon as both have found each other again, the answer is what it was."""
    pair.wait_free()
    pair.decode.until(lambda: pair.ask(BODY).status_code == 200)
    assert pair.ask(BODY).json()["output_ids"] == expected
    pair.wait_free()


def statuses(waiting: list[Future[httpx.Response]]) -> list[int]:
    return [one.result(PATIENCE_S).status_code for one in waiting]


def test_prefill_stopped_and_continued(pair: Couple, expected: list[int]) -> None:
    waiting = [pair.submit(numbered(i, 8))[1] for i in range(6)]
    pair.prefill.kill(signal.SIGSTOP)
    begin_ns = clock.monotonic_ns()
    assert set(statuses(waiting)) <= {200, 503}
    assert seconds_since(begin_ns) < NOTICED_S
    pair.prefill.kill(signal.SIGCONT)
    assert_well(pair, expected)


def test_decode_stopped_and_continued(pair: Couple, expected: list[int]) -> None:
    pair.decode.kill(signal.SIGSTOP)
    waiting = [pair.submit(numbered(10 + i))[1] for i in range(3)]
    assert pair.prefill.http.get("/health_generate").status_code == 200, "health does not depend on the peer"
    pair.decode.kill(signal.SIGCONT)
    assert set(statuses(waiting)) <= {200, 503}
    assert_well(pair, expected)


def test_prefill_killed_while_requests_wait(pair: Couple, expected: list[int]) -> None:
    pair.prefill.kill(signal.SIGSTOP)
    waiting = [pair.submit(numbered(20 + i))[1] for i in range(6)]
    pair.decode.until(lambda: in_transit(pair.decode) + sum(one.done() for one in waiting) == 6)
    begin_ns = clock.monotonic_ns()
    pair.prefill.kill()
    assert statuses(waiting) == [503] * 6
    assert seconds_since(begin_ns) < NOTICED_S
    assert pair.decode.http.get("/health_generate").status_code == 200
    pair.decode.wait_free()
    pair.prefill.start_again()
    pair.prefill.wait_until_up()
    assert_well(pair, expected)  # a new peer behind the old port


def test_decode_killed_in_the_middle_of_its_answers(pair: Couple, expected: list[int]) -> None:
    """Last with this pair: its decode server is not there any more after it."""
    before = pair.prefill.pairs()["total_paired"]
    first, second = pair.submit(LONG)
    assert first.result(PATIENCE_S).status_code == 200, first.result().text
    waiting = [pair.submit(numbered(30 + i))[0] for i in range(4)]
    pair.prefill.until(lambda: pair.prefill.pairs()["total_paired"] == before + 5)
    pair.decode.kill()
    assert second.result(PATIENCE_S).status_code == 503
    assert set(statuses(waiting)) <= {200, 503}
    pair.prefill.wait_free()
    assert pair.prefill.http.get("/health_generate").status_code == 200


def test_decode_that_may_prefill_by_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    with couple(tmp_path_factory.mktemp("own"), "local", decode=("--disaggregation-decode-fallback",)) as pair:
        expected = pair.ask(BODY).json()["output_ids"]
        pair.prefill.kill(signal.SIGSTOP)
        waiting = [pair.submit(BODY)[1] for _ in range(3)]
        assert [one.result(PATIENCE_S).json()["output_ids"] for one in waiting] == [expected] * 3
        pair.prefill.kill()
        assert pair.ask(BODY).json()["output_ids"] == expected
        pair.decode.wait_free()
