"""Workers: up, down, leaving, and what happens to their requests."""

from __future__ import annotations

import pytest

from moonlang.base.errors import ConfigError
from moonlang.router.breaker import BreakerLimits
from moonlang.router.workers import HealthLimits, WorkerSet, checked_url

LIMITS = BreakerLimits(failures=2, successes=1, open_ns=100, window_ns=1000)


def group(*, pairs: bool = False) -> WorkerSet:
    health = HealthLimits(failures=2, successes=2)
    return WorkerSet(pairs=pairs, health=health, breaker=LIMITS, max_index_chars=1 << 20)


def test_the_first_success_counts_and_later_ones_must_repeat() -> None:
    worker = group().add("http://a:1", "regular")
    assert not worker.usable(0)
    assert worker.checked(True)
    assert worker.usable(0)
    assert [worker.checked(False), worker.checked(True), worker.checked(False)] == [False] * 3
    assert worker.up
    assert worker.checked(False)
    assert not worker.up
    assert [worker.checked(True), worker.checked(True)] == [False, True]


def test_going_down_cuts_what_is_under_way_and_forgets_its_prefixes() -> None:
    worker = group().add("http://a:1", "regular")
    worker.checked(True)
    worker.index.add([b"1"])
    cut: list[int] = []
    first = worker.begin(lambda: cut.append(1))
    worker.begin(lambda: cut.append(2))
    worker.end(first)
    assert worker.lost()
    assert not worker.lost()
    assert (cut, len(worker.index), worker.active) == ([2], 0, 1)


def test_an_open_breaker_a_problem_and_a_farewell_keep_requests_away() -> None:
    workers = group()
    worker = workers.add("http://a:1", "regular")
    worker.checked(True)
    worker.breaker.failed(10)
    worker.breaker.failed(11)
    assert not worker.usable(20)
    assert worker.usable(200)  # on probation
    worker.problem = "It is a decode server."
    assert not worker.usable(200)
    assert workers.lacking(200) == "No regular worker is up. http://a:1: It is a decode server."
    worker.problem = ""
    worker.leaving = True
    assert workers.usable("regular", 200) == []


def test_what_is_lacking_is_named() -> None:
    workers = group(pairs=True)
    assert workers.lacking(0) == "No prefill and no decode worker is up."
    workers.add("http://a:1", "decode").checked(True)
    assert workers.lacking(0) == "No prefill worker is up."
    workers.add("http://b:1", "prefill").checked(True)
    assert workers.lacking(0) == ""


def test_workers_have_one_name_and_the_kind_of_their_router() -> None:
    workers = group()
    worker = workers.add("a:1/", "regular")
    assert workers.find("http://a:1/") is workers.find(worker.id) is worker
    with pytest.raises(ConfigError, match="already"):
        workers.add("http://a:1", "regular")
    with pytest.raises(ConfigError, match="regular workers"):
        workers.add("http://b:1", "prefill")
    worker.leaving = True
    assert workers.add("http://a:1", "regular").id != worker.id  # its successor may come while it is going
    workers.discard(worker)
    assert len(workers) == 1


@pytest.mark.parametrize("url", ["", "http://", "ftp://a:1", "http://a:99999", "http://a:1/v1", "http://a:x", "a:0"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        checked_url(url)
