"""What holds for every placement that comes out, whatever loads and ranks go in."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonlang.moe.placement import Copy, Move, Placement, balanced, even, moves

steady = settings(  # the same examples everywhere, however busy the machine is
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def _situations(draw: st.DrawFn) -> tuple[Placement, list[float]]:
    """A placement that has been balanced once or twice, and a load of its experts."""
    ranks = draw(st.integers(1, 6))
    experts = draw(st.integers(ranks, 12))
    found = even(experts, ranks, draw(st.integers(0, 8)))
    loads = st.lists(st.integers(0, 1000).map(float), min_size=experts, max_size=experts)
    for _ in range(draw(st.integers(0, 2))):
        found = balanced(draw(loads), found)
    return found, draw(loads)


def _sizes(placement: Placement) -> list[int]:
    return [len(held) for held in placement.slots]


def test_even_shares_come_with_further_copies_of_the_first_experts() -> None:
    assert even(5, 2).slots == ((0, 1), (2, 3, 4))
    placed = even(4, 2, 2)
    assert placed.slots == ((0, 1, 2), (3, 0, 1))
    assert placed.copies(0) == [Copy(0, 0), Copy(1, 1)]
    assert placed.copies(3) == [Copy(1, 0)]
    with pytest.raises(ValueError, match="cannot share"):
        even(2, 3)


def test_an_expert_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Placement(((0, 2), (3, 0)))


@steady
@given(_situations())
def test_balanced_keeps_the_slots_and_never_makes_it_worse(situation: tuple[Placement, list[float]]) -> None:
    old, load = situation
    new = balanced(load, old)
    assert (_sizes(new), new.experts) == (_sizes(old), old.experts)
    assert max(new.rank_loads(load)) <= max(old.rank_loads(load))
    assert new.balancedness(load) >= old.balancedness(load) - 1e-9
    again = balanced(load, new)
    assert again is new or max(again.rank_loads(load)) < max(new.rank_loads(load)), "nothing moves in vain"


@steady
@given(_situations())
def test_balanced_spreads_copies_over_ranks(situation: tuple[Placement, list[float]]) -> None:
    """No two copies of an expert share a rank, unless there are more slots than that."""
    old, load = situation
    new = balanced(load, old)
    if new is not old and sum(_sizes(new)) <= new.experts * len(new.slots):
        assert all(len(set(held)) == len(held) for held in new.slots)


def test_the_busiest_experts_get_the_copies() -> None:
    load = [100.0, 1.0, 1.0, 1.0, 1.0, 60.0]
    new = balanced(load, even(6, 2, 2))
    assert [len(copies) for copies in new.all_copies()] == [2, 1, 1, 1, 1, 2]
    assert new.balancedness(load) == 1.0


def test_little_moves_when_little_changes() -> None:
    """A placement from scratch would be a little better, and nearly every expert would be somewhere else."""
    chosen = random.Random(1)
    load = [chosen.paretovariate(1.2) for _ in range(64)]
    first = balanced(load, even(64, 8, 8))
    assert first.balancedness(load) > 0.9
    second = balanced([one * chosen.uniform(0.8, 1.25) for one in load], first)
    assert len(moves(first, second)) < 72 // 2


def test_what_can_stay_does() -> None:
    """The same spread on other ranks, or in other slots, would be as good."""
    old = Placement(((3, 0), (2, 1)))
    assert balanced([4.0, 1.0, 4.0, 1.0], old) is old
    new = balanced([4.0, 3.0, 2.0, 3.0], old)
    assert new == old or len(moves(old, new)) <= 2


@steady
@given(_situations())
def test_moves_turn_the_old_into_the_new(situation: tuple[Placement, list[float]]) -> None:
    old, load = situation
    new = balanced(load, old)
    slots = [list(held) for held in old.slots]
    for move in moves(old, new):
        assert slots[move.rank][move.slot] != move.expert
        slots[move.rank][move.slot] = move.expert
    assert tuple(map(tuple, slots)) == new.slots
    assert all(before < after for before, after in pairwise(moves(old, new)))
    assert moves(even(4, 2), Placement(((0, 2), (1, 3)))) == [Move(0, 1, 2), Move(1, 0, 1)]
