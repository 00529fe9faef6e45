"""Ranks that balance their experts: they look, load and swap at the same steps, or stay as they are together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from rank_threads import on_every_rank
from torch import Tensor

from moonlang.moe.eplb import Balancer, Balancing, Put
from moonlang.moe.placement import Placement, even

EXPERTS, RANKS, EVERY = 6, 2, 8
SKEWED = [[1, 1, 50, 1, 1, 1], [1, 1, 1, 40, 30, 1]]  # what one rank's tokens choose, by layer


class Meeting:
    """What ranks that are threads tell each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.told: list[Any] = [None] * RANKS


class Told:
    """See Group; only what balancing needs."""

    size = RANKS

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self._meeting = meeting

    def all_gather(self, x: Tensor) -> Tensor:
        self._meeting.told[self.rank] = x.clone()
        self._meeting.barrier.wait()
        found = torch.stack(self._meeting.told)
        self._meeting.barrier.wait()
        return found


class Layer:
    """See ExpertLayer. may_load: set when loading may end; fails: with what."""

    def __init__(self, counts: Sequence[int], redundant: int = 2) -> None:
        self.placement = even(EXPERTS, RANKS, redundant)
        self.may_load = threading.Event()
        self.may_load.set()
        self.fails: Exception | None = None
        self._counts = torch.tensor(counts)

    def take_counts(self) -> Tensor:
        return self._counts

    def prepare(self, placement: Placement) -> Put:
        assert self.may_load.wait(60)
        if self.fails is not None:
            raise self.fails

        def put() -> None:
            self.placement = placement

        return put


def balancer(rank: int, meeting: Meeting, layers: Sequence[Layer], **settings: Any) -> Balancer:
    group: Any = Told(rank, meeting)
    return Balancer(layers, group, Balancing(every=EVERY, **settings))


def changes(mine: Balancer, layers: Sequence[Layer], rebalances: int) -> list[tuple[int, tuple[int, ...]]]:
    """Steps until so many times all has moved: (step, which layers moved) of those in which any did."""
    found, step = [], 0
    while mine.totals.rebalances < rebalances:
        before = [layer.placement for layer in layers]
        mine.step()
        step += 1
        moved = tuple(i for i, layer in enumerate(layers) if layer.placement != before[i])
        found += [(step, moved)] if moved else []
    return found


def look(mine: Balancer, times: int) -> None:
    """Steps until so many looks at the load have come to an end."""
    while times:
        was_busy = mine.busy
        mine.step()
        times -= was_busy and not mine.busy


def test_all_swap_at_the_same_step() -> None:
    meeting = Meeting()

    def work(rank: int) -> tuple[Any, ...]:
        layers = [Layer(counts) for counts in SKEWED]
        mine = balancer(rank, meeting, layers)
        if rank == 1:  # is slower than the other
            layers[0].may_load.clear()
            threading.Timer(0.1, layers[0].may_load.set).start()
        steps = changes(mine, layers, 1)
        totals = mine.totals
        return steps, totals.moved, totals.before, totals.after, [layer.placement for layer in layers]

    first, second = on_every_rank(RANKS, work)
    assert first == second
    steps, moved, before, after, placements = first
    assert [layers for _, layers in steps] == [(0, 1)]
    assert moved > 0
    assert before < 0.8 < after
    assert len(placements[0].copies(2)) == 2


def test_some_layers_at_a_time() -> None:
    meeting = Meeting()

    def work(rank: int) -> Any:
        layers = [Layer(counts) for counts in SKEWED]
        return [moved for _, moved in changes(balancer(rank, meeting, layers, chunk=1), layers, 1)]

    assert on_every_rank(RANKS, work) == [[(0,), (1,)]] * RANKS


def test_a_rank_that_cannot_load_keeps_all_as_they_are() -> None:
    """And next time they try again."""
    meeting = Meeting()

    def work(rank: int) -> None:
        layer = Layer(SKEWED[0])
        mine = balancer(rank, meeting, [layer])
        if rank == 1:
            layer.fails = OSError("the checkpoint is gone")
        look(mine, 3)
        assert layer.placement == even(EXPERTS, RANKS, 2)
        layer.fails = None
        changes(mine, [layer], 1)
        assert layer.placement != even(EXPERTS, RANKS, 2)

    on_every_rank(RANKS, work)


def test_what_is_balanced_enough_stays() -> None:
    meeting = Meeting()

    def work(rank: int) -> tuple[int, int]:
        layers = [Layer(counts) for counts in SKEWED]
        mine = balancer(rank, meeting, layers, threshold=0.1)
        look(mine, 3)
        return mine.totals.rebalances, [layer.placement for layer in layers]

    assert on_every_rank(RANKS, work) == [(0, [even(EXPERTS, RANKS, 2)] * 2)] * RANKS
