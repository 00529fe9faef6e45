"""Which ranks compute the same layers, and whether they share a host."""

from __future__ import annotations

import pytest

from moonlang.core.seat import Seat


def seat(rank: int, size: int, stages: int, local: int) -> Seat:
    return Seat(
        rank=rank, size=size, stages=stages, local_size=local, meeting="/m/all", plans="", backend="shared_memory"
    )


def test_a_place_in_a_stage() -> None:
    stage = seat(5, 8, stages=2, local=8).of_stage()
    assert (stage.rank, stage.size, stage.stages, stage.path) == (1, 4, 1, "/m/all-stage1")


@pytest.mark.parametrize(
    ("size", "stages", "local", "within"),
    [
        (4, 1, 4, [True] * 4),
        (4, 1, 2, [False] * 4),
        (4, 2, 2, [True] * 4),  # a stage on each of two hosts
        (6, 3, 3, [True] * 2 + [False] * 2 + [True] * 2),  # the second stage is on both
        (4, 2, 1, [False] * 4),
    ],
)
def test_ranks_of_a_stage_may_share_a_host(size: int, stages: int, local: int, within: list[bool]) -> None:
    assert [seat(rank, size, stages, local).of_stage().within_host for rank in range(size)] == within
