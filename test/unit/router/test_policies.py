"""Policies: who gets the next request, given loads and prefixes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from moonlang.router import policy
from moonlang.router.breaker import BreakerLimits
from moonlang.router.policy import CacheAware
from moonlang.router.prefix_index import BLOCK_CHARS, path
from moonlang.router.workers import HealthLimits, Worker, WorkerSet

LIMITS = CacheAware(threshold=0.5, abs_load=4, rel_load=1.5)


def workers(*loads: int) -> list[Worker]:
    limits = BreakerLimits(failures=3, successes=1, open_ns=1, window_ns=1)
    group = WorkerSet(
        pairs=False, health=HealthLimits(failures=1, successes=1), breaker=limits, max_index_chars=1 << 20
    )
    for number, load in enumerate(loads):
        worker = group.add(f"http://w{number}:1", "regular")
        for _ in range(load):
            worker.begin(lambda: None)
    return list(group)


def chosen(name: str, group: list[Worker], prompts: list[bytes], seed: int = 1) -> list[str]:
    choose = policy.find(name, random.Random(seed), LIMITS)
    return [choose(group, path(prompt)).host for prompt in prompts]


def text(letter: str) -> bytes:
    return letter.encode() * (4 * BLOCK_CHARS)


def test_round_robin_takes_turns_also_when_some_come_and_go() -> None:
    group = workers(0, 0, 0)
    choose = policy.find("round_robin", random.Random(1), LIMITS)
    assert [choose(group, ()).host for _ in range(4)] == ["w0", "w1", "w2", "w0"]
    assert choose(group[2:], ()).host == "w2"
    assert choose(group, ()).host == "w0"


def test_random_and_power_of_two_reach_everybody() -> None:
    for name in ("random", "power_of_two"):
        count = Counter(chosen(name, workers(0, 0, 0), [b""] * 300))
        assert set(count) == {"w0", "w1", "w2"}
        assert min(count.values()) > 50


def test_power_of_two_never_takes_the_busiest() -> None:
    assert "w1" not in chosen("power_of_two", workers(0, 9, 1), [b""] * 100)
    assert chosen("power_of_two", workers(5), [b""]) == ["w0"]


def test_cache_aware_keeps_a_prefix_together() -> None:
    group = workers(0, 0, 0)
    homes = chosen("cache_aware", group, [text("a"), text("b"), text("c")])
    assert sorted(homes) == ["w0", "w1", "w2"]  # unknown ones go where least is known
    again = chosen("cache_aware", group, [text("a") + text("x"), text("b"), text("c"), text("a")])
    assert again == [homes[0], homes[1], homes[2], homes[0]]


def test_cache_aware_wants_enough_of_the_prompt() -> None:
    for rest, home in ((text("b") * 2, "w1"), (text("b"), "w0")):  # a third of it is below the threshold, a half is not
        group = workers(1, 0)
        group[0].index.add(path(text("a")))
        assert chosen("cache_aware", group, [text("a") + rest]) == [home]


@pytest.mark.parametrize(("busy", "home"), [(5, "w1"), (4, "w0")])
def test_cache_aware_gives_way_to_balance(busy: int, home: str) -> None:
    group = workers(busy, 0)
    group[0].index.add(path(text("a")))
    assert chosen("cache_aware", group, [text("a")]) == [home]


def test_an_unknown_prompt_goes_to_the_idlest_not_to_the_emptiest() -> None:
    group = workers(3, 0)
    group[1].index.add(path(text("a")))
    assert chosen("cache_aware", group, [text("z"), b"short"]) == ["w1", "w1"]


def test_of_two_that_know_it_the_idler_one() -> None:
    group = workers(2, 1)
    for worker in group:
        worker.index.add(path(text("a")))
    assert chosen("cache_aware", group, [text("a")]) == ["w1"]
