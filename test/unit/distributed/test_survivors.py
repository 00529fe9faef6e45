"""Ranks whose processes end: those that are left agree on who that is. Each process here only sleeps, and a thread
stands for what its rank would do."""

from __future__ import annotations

import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from expert_exchanges import join, seat
from rank_threads import on_every_rank

from moonlang.base.errors import PeerError
from moonlang.distributed.survivors import Survivors, largest_tree

SIZE = 4
DEADLINE_S = 60.0


class Pids:
    """A group, of which only the ids of processes are asked."""

    rank, size, native = 0, SIZE, None

    def __init__(self, pids: list[int]) -> None:
        self._pids = torch.tensor(pids)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._pids

    all_reduce = broadcast = all_gather

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class World:
    def __init__(self, folder: Path, patience_s: float = DEADLINE_S) -> None:
        self.processes = [subprocess.Popen(["sleep", "600"]) for _ in range(SIZE)]
        group = Pids([process.pid for process in self.processes])
        self.ranks: list[Survivors] = []
        for rank in range(SIZE):
            place = seat(folder, rank, SIZE, patience_s=patience_s)
            place = msgspec.structs.replace(place, plans=str(folder / "plans"))
            self.ranks.append(Survivors(place, group, largest_tree))

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].kill()
            self.processes[rank].wait()

    def agree(self, *ranks: int) -> None:
        assert all(on_every_rank(len(ranks), lambda place: self.ranks[ranks[place]].agree()))

    def members(self, *ranks: int) -> set[tuple[int, ...]]:
        return {self.ranks[rank].members for rank in ranks}

    def close(self) -> None:
        self.kill(*range(SIZE))
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def test_how_many_go_on() -> None:
    assert [len(largest_tree(tuple(range(left)))) for left in range(1, 10)] == [1, 2, 2, 4, 4, 4, 4, 8, 8]
    assert largest_tree((1, 3, 6)) == (1, 3)


def test_all_notice_and_agree(world: World) -> None:
    assert not world.ranks[0].broken
    world.kill(1)
    for rank in (0, 2, 3):
        assert select.select([world.ranks[rank]], [], [], DEADLINE_S)[0]
        assert world.ranks[rank].broken
    world.agree(0, 2, 3)
    assert world.members(0, 2, 3) == {(0, 2)}
    places = [world.ranks[rank].seat for rank in (0, 2, 3)]
    assert [place and place.rank for place in places] == [0, 1, None]
    assert places[0] is not None
    assert places[1] is not None
    assert places[0].meeting == places[1].meeting
    world.kill(3)
    assert not world.ranks[0].broken  # nobody needs that one
    assert world.ranks[0].shrunk
    world.kill(2)
    world.agree(0)
    assert world.members(0) == {(0,)}


def test_a_loss_while_they_agree(world: World) -> None:
    """Rank 0 has signed for a list that rank 3 does not live to sign: those who saw it come to the next one."""
    world.kill(1)

    def work(place: int) -> bool:
        if place == 0:
            return world.ranks[0].agree()
        if place == 1:
            assert select.select([world.ranks[2]], [], [], DEADLINE_S)[0]
            world.kill(3)
        return world.ranks[2].agree() if place == 1 else True

    assert all(on_every_rank(2, work))
    assert world.members(0, 2) == {(0, 2)}
    place = world.ranks[0].seat
    assert place is not None
    assert place.meeting.endswith("-5.0")


def test_who_waits_where_another_has_been_hears_that_it_left(world: World) -> None:
    for rank in (0, 1, 2, 3):
        world.ranks[rank]._sign((0, 1, 2, 3))
    stays = world.ranks[1]
    stays._settle((0, 1, 2, 3))
    for rank in (0, 2, 3):
        world.ranks[rank]._withdraw()
    assert stays.seat is not None
    with pytest.raises(PeerError, match="has ended"):
        join(stays.seat)


def test_those_who_are_not_lost_meet_again(world: World) -> None:
    """One has given up on another that was only slow."""
    world.agree(0, 1, 2, 3)
    world.agree(0, 1, 2, 3)
    assert world.members(0, 1, 2, 3) == {(0, 1, 2, 3)}
    first = world.ranks[0].seat
    assert first is not None
    world.agree(0, 1, 2, 3)
    assert first.meeting != world.ranks[0].seat.meeting  # type: ignore[union-attr]


def test_one_that_does_not_come_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path, patience_s=2)  # longer than a busy machine takes to bring the others together
    try:
        world.agree(0, 1, 3)
        assert world.members(0, 1, 3) == {(0, 1)}
        assert world.processes[2].wait(DEADLINE_S) < 0
    finally:
        world.close()


def test_stopping(world: World) -> None:
    assert not world.ranks[0].agree(lambda: True)
