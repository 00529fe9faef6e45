"""Surveys between the steps of the scheduler role: one at a time, a bounded part per step, a bounded queue."""

from __future__ import annotations

import pytest

from moonlang.mem_cache.eviction import ORDERS
from moonlang.mem_cache.pool import PagePool
from moonlang.mem_cache.radix import RadixCache
from moonlang.roles import surveys
from moonlang.roles.surveys import MOST, Surveys


@pytest.fixture
def cache() -> RadixCache:
    """Fifty prefixes of one page."""
    pool = PagePool(100)
    found = RadixCache(pool, 1, ORDERS["lru"])
    for token in range(50):
        found.insert([token], pool.take(1), "")
    return found


def test_a_step_looks_at_so_many_nodes_and_no_more(cache: RadixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveys, "LOOKS", 20)
    queue = Surveys()
    assert queue.begin(7, cache, 100)
    steps = 0
    while queue.busy:
        found = queue.advance()
        steps += 1
        assert bool(found) == (not queue.busy)
    assert steps == 6  # the root and 50 children are looked at, and then taken: 102 looks, and one that finds nothing
    assert [(control_id, len(body["id"])) for control_id, body in found] == [(7, 51)]
    assert queue.advance() == []


def test_who_asks_last_is_answered_last_and_too_many_are_refused(cache: RadixCache) -> None:
    queue = Surveys()
    assert [queue.begin(number, cache, 5) for number in range(MOST + 1)] == [True] * MOST + [False]
    answered: list[int] = []
    while queue.busy:
        answered += [control_id for control_id, _ in queue.advance()]
    assert answered == list(range(MOST))
