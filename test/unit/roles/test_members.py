"""Where experts are when ranks that shared them are lost."""

from __future__ import annotations

from itertools import combinations

import pytest

from moonlang.moe.placement import Placement, even
from moonlang.roles.members import slots_of_those_left

SIZE = 4


@pytest.mark.parametrize(("experts", "copies"), [(4, 0), (8, 2), (32, 5)])
def test_what_is_left_stays_and_nothing_is_missing(experts: int, copies: int) -> None:
    first = even(experts, SIZE, copies)
    for count in range(1, SIZE):
        for members in combinations(range(SIZE), count):
            slots = slots_of_those_left(experts, copies, SIZE, members)
            assert Placement(slots).experts == experts
            for rank, held in zip(members, slots, strict=True):
                before = first.slots[rank]
                assert held[: len(before)] == before
            new = [
                expert for rank, held in zip(members, slots, strict=True) for expert in held[len(first.slots[rank]) :]
            ]
            kept = {expert for rank in members for expert in first.slots[rank]}
            assert sorted(new) == sorted(set(range(experts)) - kept)  # none that has a copy is loaded
