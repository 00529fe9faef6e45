"""Balancing experts while they serve: from what tokens have chosen lately to a placement, and to it without stopping.

All ranks run the same steps, so they count alike and meet alike: at the same step each adds up the choices of all. In
a thread beside the model each then finds the placement, which is the same for all, and loads what its slots lack. Every
few steps they tell each other how far they are; when all are ready they put it in place, between the same two steps.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from moonlang.base import log
from moonlang.distributed.group import Group
from moonlang.moe.placement import Placement, balanced, moves

_log = log.get(__name__)

RANK_TOKENS: Final = tuple(4.0**i for i in range(11))  # bounds of buckets, up to a million
_MEET: Final = 4  # steps between two times that ranks tell each other how far they are
_LOADING, _READY, _FAILED = 0, 1, 2

Put = Callable[[], None]


class ExpertLayer(Protocol):
    """A layer of experts that can be placed anew."""

    @property
    def placement(self) -> Placement: ...

    def take_counts(self) -> Tensor:
        """[E] int64: how often this rank's tokens have chosen each expert since the last call."""
        ...

    def prepare(self, placement: Placement) -> Put:
        """Load what this rank's slots lack. In any thread, beside the model; what is returned is called between two
        steps, by all ranks alike, and takes no time. MemoryError, OSError or ConfigError when it cannot be had."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Balancing:
    """every: steps from one look at the load to the next. chunk: layers that move at a time, all when None. threshold:
    ranks that are busier than that (`Placement.balancedness`, the mean of all layers) are left as they are."""

    every: int = 1000
    chunk: int | None = None
    threshold: float = 1.0


@dataclass(slots=True)
class Totals:
    """What balancing has done so far; written by the thread that runs the model.

    before, after: balancedness of the load that was looked at last, as it was, and as it would have been with what
    came of it; before_sum: over all looks. moved: slots, on all ranks. rank_counts, rank_sums: by layer, the tokens
    that each rank had between two looks, as counts per bucket of RANK_TOKENS (the last one is open), and added up.
    """

    rank_counts: list[list[int]]
    rank_sums: list[float]
    looks: int = 0
    rebalances: int = 0
    moved: int = 0
    before: float = 1.0
    after: float = 1.0
    before_sum: float = 0.0

    @staticmethod
    def of(layers: int) -> Totals:
        """Nothing so far."""
        return Totals([[0] * (len(RANK_TOKENS) + 1) for _ in range(layers)], [0.0] * layers)

    def look(self, balancedness: float, rank_loads: Sequence[Sequence[float]]) -> None:
        """rank_loads: by layer, tokens of each rank."""
        self.looks += 1
        self.before = self.after = balancedness
        self.before_sum += balancedness
        for layer, loads in enumerate(rank_loads):
            self.rank_sums[layer] += sum(loads)
            for load in loads:
                self.rank_counts[layer][bisect_left(RANK_TOKENS, load)] += 1

    def report(self) -> dict[str, Any]:
        """By name, for whoever keeps metrics."""
        return asdict(self) | {"bounds": list(RANK_TOKENS)}


@dataclass(slots=True)
class _Job:
    """What follows from one look at the load [L, E]. chunks: placements by layer, of layers that move at a time; puts:
    of the first chunk. moved, after: what will be said of it in the end."""

    load: Tensor
    state: int = _LOADING
    planned: bool = False
    chunks: list[dict[int, Placement]] = field(default_factory=list[dict[int, Placement]])
    puts: list[Put] = field(default_factory=list[Put])
    moved: int = 0
    after: float = 1.0
    error: str = ""

    def digest(self) -> int:
        """Of all that will be where, which ranks must agree about."""
        wanted = [(layer, placed.slots) for chunk in self.chunks for layer, placed in chunk.items()]
        return zlib.crc32(repr(wanted).encode())


class Balancer:
    """Balances the layers of one rank, which makes the same calls as all others."""

    def __init__(
        self, layers: Sequence[ExpertLayer], group: Group, balancing: Balancing, totals: Totals | None = None
    ) -> None:
        """totals: of a balancer before this one, which go on."""
        self.totals = totals or Totals.of(len(layers))
        self._layers = layers
        self._group = group
        self._balancing = balancing
        self._steps = 0
        self._job: _Job | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still to come of a look at the load; on all ranks the same after each step."""
        return self._job is not None

    def step(self) -> None:
        """Between two steps of the model. PeerError when a rank is lost."""
        self._steps += 1
        if self._job is not None:
            if self._steps % _MEET == 0:
                self._meet(self._job)
        elif self._steps % self._balancing.every == 0:
            counts = torch.stack([layer.take_counts() for layer in self._layers])
            self._job = _Job(self._group.all_gather(counts).sum(0))
            self._go_on(self._job)

    def _go_on(self, job: _Job) -> None:
        job.state = _LOADING
        threading.Thread(target=self._work, args=(job,), name="expert-loader", daemon=True).start()

    def _work(self, job: _Job) -> None:
        """Beside the model: find placements, and load what the first of them need."""
        try:
            if not job.planned:
                self._plan(job)
            if job.chunks:
                job.puts = [self._layers[layer].prepare(placed) for layer, placed in job.chunks[0].items()]
            job.state = _READY
        except BaseException as error:  # noqa: BLE001 - told to all ranks, which stay as they are then
            job.error = f"{type(error).__name__}: {error}"
            job.state = _FAILED

    def _plan(self, job: _Job) -> None:
        loads, old = job.load.tolist(), [layer.placement for layer in self._layers]
        rank_loads = [placed.rank_loads(load) for placed, load in zip(old, loads, strict=True)]
        self.totals.look(_mean_balancedness(old, loads), rank_loads)
        job.planned = True
        if self.totals.before > self._balancing.threshold:
            return
        new = [balanced(load, placed) for placed, load in zip(old, loads, strict=True)]
        changed = [layer for layer, placed in enumerate(new) if placed != old[layer]]
        step = self._balancing.chunk or max(1, len(changed))
        job.chunks = [
            {layer: new[layer] for layer in changed[first : first + step]} for first in range(0, len(changed), step)
        ]
        job.moved = sum(len(moves(old[layer], new[layer])) for layer in changed)
        job.after = _mean_balancedness(new, loads)

    def _meet(self, job: _Job) -> None:
        """With the other ranks, to hear how far they are."""
        state = job.state  # first: what is ready does not change any more
        told = self._group.all_gather(torch.tensor([state, job.digest() if state == _READY else 0]))
        states, digests = told[:, 0].tolist(), told[:, 1].tolist()
        if _LOADING in states:
            return
        if _FAILED in states or len(set(digests)) > 1:
            _log.error("Experts stay where they are: %s", job.error or "another rank cannot load what it lacks.")
            self._job = None
        else:
            self._put(job)

    def _put(self, job: _Job) -> None:
        if not job.chunks:
            self._job = None
            return
        for put in job.puts:
            put()
        del job.chunks[0]
        if job.chunks:
            self._go_on(job)
            return
        self._job, totals = None, self.totals
        totals.rebalances += 1
        totals.moved += job.moved
        totals.after = job.after
        if self._group.rank == 0:
            _log.info(
                "Experts are balanced. balancedness: %.3f -> %.3f, moved slots: %d, step: %d",
                totals.before,
                totals.after,
                job.moved,
                self._steps,
            )


def _mean_balancedness(placements: Sequence[Placement], loads: Sequence[Sequence[int]]) -> float:
    found = [placed.balancedness(load) for placed, load in zip(placements, loads, strict=True)]
    return sum(found) / len(found)
