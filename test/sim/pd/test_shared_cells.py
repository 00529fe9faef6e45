"""A pool that others write into: layers in time, heads in place, and what is used while it makes no sense."""

from __future__ import annotations

import pytest

from moonlang.core.kv import KvRegion, KvSchema
from moonlang.sim.pd.cells import SharedCells
from moonlang.sim.violation import Violation


def pool(*, layers: int = 2, heads: int = 1, ranks: int = 1) -> SharedCells:
    shard = KvSchema(num_layers=layers, num_kv_heads=heads // ranks, head_dim=1, page_size=2, dtype="int8", itemsize=1)
    return SharedCells(
        [
            KvRegion(address=0, stride=shard.page_bytes, num_pages=8, schema=shard, first_head=rank * heads // ranks)
            for rank in range(ranks)
        ]
    )


def copy(source: SharedCells, page: int, target: SharedCells, other: int, parts: range) -> None:
    for part in parts:
        target.land(other, part, part, source.snapshot(page, part))


def filled() -> SharedCells:
    cells = pool()
    cells.write(1, 0, 10)
    cells.write(1, 1, 20)
    return cells


def test_a_page_that_has_come_whole_reads_like_one_that_was_written() -> None:
    target = pool()
    copy(filled(), 1, target, 5, range(4))
    assert target.read([5], 2) == 30
    target.write(6, 0, 7)
    assert target.read([5, 6], 3) == 37


def test_what_is_read_before_all_parts_are_there_makes_no_sense_and_stays_as_it_is() -> None:
    target = pool()
    copy(filled(), 1, target, 5, range(3))
    assert target.read([5], 2) != 30
    copy(filled(), 1, target, 5, range(3, 4))
    assert target.read([5], 2) == 30


def test_a_page_is_not_written_on_while_its_parts_disagree() -> None:
    target = pool()
    half = pool()
    half.write(1, 0, 10)
    copy(half, 1, target, 5, range(3))
    with pytest.raises(Violation, match="different cells"):
        target.write(5, 1, 3)


def test_another_layer_in_the_place_of_one_is_noticed() -> None:
    target = pool()
    copy(filled(), 1, target, 5, range(4))
    target.land(5, 0, 1, filled().snapshot(1, 1))
    assert target.read([5], 2) != 30


def test_layers_of_a_running_plan_are_seen_as_they_are_written() -> None:
    cells = filled()
    before = cells.snapshot(1, 0)
    cells.stage()
    cells.write(1, 0, 5)
    assert [cells.snapshot(1, part) for part in range(4)] == [before] * 4
    cells.advance(1)
    assert [cells.snapshot(1, part) for part in range(4)] == [(5,), (5,), before, before]
    cells.finish()
    assert [cells.snapshot(1, part) for part in range(4)] == [(5,)] * 4


def test_bytes_of_a_rank_are_parts_of_the_whole_page() -> None:
    two = pool(layers=1, heads=4, ranks=2)
    assert list(two.parts(0, 0, 8)) == [0, 1, 4, 5]
    assert list(two.parts(1, 4, 4)) == [6, 7]
    assert list(pool(layers=1, heads=4).parts(0, 4, 4)) == [2, 3]
    with pytest.raises(Violation, match="whole heads"):
        two.parts(0, 1, 2)
    with pytest.raises(Violation, match="whole heads"):
        two.parts(0, 4, 6)
