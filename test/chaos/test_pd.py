"""Halves of a pair that are killed or stopped: every client gets its answer or a clear error, no page is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from pd_servers import Couple, PdServer, couple, seconds_since

from moonlang.base import clock

NOTICED_S = 1.5  # a second to notice, the rest for this machine
BODY = {"text": "Once upon a time there was " * 12, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
LONG = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}


@pytest.fixture(params=["local", "mooncake_tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Couple]:
    with couple(tmp_path, request.param) as both:
        yield both


def statuses(waiting: list[Future[httpx.Response]]) -> list[int]:
    return [one.result(30).status_code for one in waiting]


def test_prefill_killed_while_requests_wait(pair: Couple, tmp_path: Path) -> None:
    expected = pair.ask(BODY).json()["output_ids"]
    pair.prefill.kill(signal.SIGSTOP)
    waiting = [pair.submit({**BODY, "text": f"{i}: {BODY['text']}"})[1] for i in range(6)]
    pair.decode.until(lambda: pair.decode.pairs()["num_pairing"] + pair.decode.pairs()["num_moving"] == 6)
    begin_ns = clock.monotonic_ns()
    pair.prefill.kill()
    assert statuses(waiting) == [503] * 6
    assert seconds_since(begin_ns) < NOTICED_S
    assert pair.decode.http.get("/health_generate").status_code == 200
    pair.decode.wait_free()
    pair.prefill.process.wait(30)
    backend = pair.decode.http.get("/server_info").json()["disaggregation_transfer_backend"]
    with PdServer(tmp_path, "prefill", pair.bootstrap_port, backend) as pair.prefill:  # a new peer behind the old port
        assert pair.ask(BODY).json()["output_ids"] == expected
        pair.wait_free()


def test_decode_killed_in_the_middle_of_its_answer(pair: Couple) -> None:
    first, second = pair.submit(LONG)
    assert first.result(30).status_code == 200
    waiting = [pair.submit({**BODY, "text": f"{i}: {BODY['text']}"})[0] for i in range(4)]
    pair.prefill.until(lambda: pair.prefill.pairs()["total_paired"] == 5)
    pair.decode.kill()
    assert second.result(10).status_code == 503
    assert set(statuses(waiting)) <= {200, 503}
    pair.prefill.wait_free()
    assert pair.prefill.http.get("/health_generate").status_code == 200


def test_prefill_stopped_and_continued(pair: Couple) -> None:
    expected = pair.ask(BODY).json()["output_ids"]
    waiting = [pair.submit({**BODY, "text": f"{i}: {BODY['text'] * 8}"})[1] for i in range(6)]
    pair.prefill.kill(signal.SIGSTOP)
    begin_ns = clock.monotonic_ns()
    found = statuses(waiting)
    assert set(found) <= {200, 503}
    assert seconds_since(begin_ns) < NOTICED_S + 1
    pair.prefill.kill(signal.SIGCONT)
    pair.wait_free()
    assert pair.ask(BODY).json()["output_ids"] == expected


def test_decode_stopped_and_continued(pair: Couple) -> None:
    expected = pair.ask(BODY).json()["output_ids"]
    pair.decode.kill(signal.SIGSTOP)
    waiting = [pair.submit({**BODY, "text": f"{i}: {BODY['text']}"}) for i in range(3)]
    assert pair.prefill.http.get("/health_generate").status_code == 200, "health does not depend on the peer"
    os.kill(pair.decode.scheduler, signal.SIGCONT)
    assert set(statuses([decode for _, decode in waiting])) <= {200, 503}
    pair.wait_free()
    assert pair.ask(BODY).json()["output_ids"] == expected


def test_decode_that_may_prefill_by_itself(tmp_path: Path) -> None:
    with couple(tmp_path, "local", decode=("--disaggregation-decode-fallback",)) as pair:
        expected = pair.ask(BODY).json()["output_ids"]
        pair.prefill.kill(signal.SIGSTOP)
        waiting = [pair.submit(BODY)[1] for _ in range(3)]
        assert [one.result(30).json()["output_ids"] for one in waiting] == [expected] * 3
        pair.prefill.kill()
        assert pair.ask(BODY).json()["output_ids"] == expected
        pair.decode.wait_free()
