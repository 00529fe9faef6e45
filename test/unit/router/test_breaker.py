"""The circuit breaker, second by second."""

from __future__ import annotations

from moonlang.base.clock import NS_PER_S
from moonlang.router.breaker import Breaker, BreakerLimits

LIMITS = BreakerLimits(failures=3, successes=2, open_ns=10 * NS_PER_S, window_ns=60 * NS_PER_S)


def broken(*at_s: float) -> Breaker:
    breaker = Breaker(LIMITS)
    for second in at_s:
        breaker.failed(int(second * NS_PER_S))
    return breaker


def test_it_opens_after_so_many_failures() -> None:
    assert broken(1, 2).state(2 * NS_PER_S) == "closed"
    assert broken(1, 2, 3).state(3 * NS_PER_S) == "open"


def test_only_failures_close_together_count() -> None:
    assert broken(0, 30, 61).state(61 * NS_PER_S) == "closed"
    assert broken(0, 30, 61, 62).state(62 * NS_PER_S) == "open"


def test_after_a_while_it_is_on_probation() -> None:
    breaker = broken(1, 2, 3)
    assert breaker.state(13 * NS_PER_S - 1) == "open"
    assert breaker.state(13 * NS_PER_S) == "half_open"
    breaker.succeeded(14 * NS_PER_S)
    assert breaker.state(14 * NS_PER_S) == "half_open"
    breaker.succeeded(15 * NS_PER_S)
    assert breaker.state(15 * NS_PER_S) == "closed"
    breaker.failed(16 * NS_PER_S)  # the old failures are forgotten
    assert breaker.state(16 * NS_PER_S) == "closed"


def test_a_failure_on_probation_opens_it_at_once() -> None:
    breaker = broken(1, 2, 3)
    breaker.succeeded(14 * NS_PER_S)
    breaker.failed(15 * NS_PER_S)
    assert breaker.state(24 * NS_PER_S) == "open"
    breaker.succeeded(25 * NS_PER_S)
    assert breaker.state(25 * NS_PER_S) == "half_open"  # one success is not two


def test_without_a_limit_it_never_opens() -> None:
    breaker = Breaker(BreakerLimits(failures=0, successes=1, open_ns=1, window_ns=1))
    for now_ns in range(100):
        breaker.failed(now_ns)
    assert breaker.state(100) == "closed"
