"""A reader stays awake only where it pays, and never for more than a few percent of the time."""

from __future__ import annotations

import random

from moonlang.base.clock import NS_PER_S
from moonlang.mooncake.patience import FEW, FREE_NS, MANY, SHORT_NS, STAY_NS, Patience


def sleep(patience: Patience, now_ns: int, waited_ns: int, *, message: bool = True) -> int:
    """One wait asleep; the time behind it."""
    patience.asleep(now_ns + waited_ns, message)
    return now_ns + waited_ns


def patient(cores: int = 2) -> tuple[Patience, int]:
    """After as many short waits as it takes, and the time."""
    patience, now_ns = Patience(cores), NS_PER_S
    for _ in range(FEW):
        assert not patience.begin(now_ns)
        now_ns = sleep(patience, now_ns, SHORT_NS)
    return patience, now_ns


def test_short_waits_in_a_row_make_it_stay_awake() -> None:
    patience, now_ns = patient()
    assert patience.begin(now_ns)


def test_one_long_wait_or_another_reason_begins_anew() -> None:
    for waited_ns, message in ((SHORT_NS + 1, True), (1, False)):
        patience, now_ns = patient()
        sleep(patience, now_ns, waited_ns, message=message)
        assert patience.short == 0


def test_a_single_core_is_left_to_the_sender() -> None:
    patience, now_ns = patient(cores=1)
    assert not patience.begin(now_ns)


def test_each_time_in_vain_asks_for_twice_as_many_and_each_success_for_half() -> None:
    patience, now_ns = patient()
    for _ in range(20):
        patience.in_vain(now_ns)
    assert patience.needed == MANY
    patience.begin(now_ns)
    patience.awake(now_ns)
    assert patience.needed == MANY // 2
    for _ in range(20):
        patience.awake(now_ns)
    assert patience.needed == FEW


def test_waits_that_cost_less_than_a_sleep_are_free() -> None:
    patience, now_ns = patient()
    for _ in range(20_000):
        assert patience.begin(now_ns)
        now_ns += FREE_NS
        patience.awake(now_ns)


def test_whatever_comes_it_burns_little() -> None:
    """Waits of all lengths: what is spent awake beyond what a sleep costs stays within the allowance."""
    rng = random.Random(1)
    patience, now_ns = patient()
    begun_ns, burnt_ns, stayed = now_ns, 0, 0
    for _ in range(20_000):
        waited_ns = rng.randrange(STAY_NS + STAY_NS // 8)
        awake_ns = 0
        if patience.begin(now_ns):
            stayed += 1
            awake_ns = min(waited_ns, STAY_NS)
            burnt_ns += max(0, awake_ns - FREE_NS)
            if waited_ns < STAY_NS:
                patience.awake(now_ns + waited_ns)
            else:
                patience.in_vain(now_ns + STAY_NS)
        if awake_ns < waited_ns:
            sleep(patience, now_ns, waited_ns)
        now_ns += waited_ns + 1000
    assert stayed > 100
    assert burnt_ns < (now_ns - begun_ns) / 25
