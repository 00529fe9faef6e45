"""Balancing experts while they serve: from what tokens have chosen lately to a placement, and to it without stopping.

All ranks run the same steps, so they count alike and meet alike: at the same step each adds up the choices of all, and
finds the same placement. Each then loads what its slots lack in a thread of its own. Every few steps they tell each
other how far they are, and when all are ready they put it in place, between the same two steps.
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
class _Move:
    """Some layers on their way to a new placement."""

    placements: dict[int, Placement]  # by layer
    state: int = _LOADING
    puts: list[Put] = field(default_factory=list[Put])
    error: str = ""

    @property
    def digest(self) -> int:
        return zlib.crc32(repr(sorted((layer, placed.slots) for layer, placed in self.placements.items())).encode())


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
        self._moves: list[_Move] = []
        self._loads: list[list[int]] = []

    def step(self) -> None:
        """Between two steps of the model. PeerError when a rank is lost."""
        self._steps += 1
        if self._moves:
            if self._steps % _MEET == 0:
                self._meet(self._moves[0])
        elif self._steps % self._balancing.every == 0:
            self._look()

    def _look(self) -> None:
        counts = torch.stack([layer.take_counts() for layer in self._layers])
        self._loads = self._group.all_gather(counts).sum(0).tolist()
        totals, old = self.totals, [layer.placement for layer in self._layers]
        rank_loads = [placed.rank_loads(load) for placed, load in zip(old, self._loads, strict=True)]
        totals.look(_mean_balancedness(old, self._loads), rank_loads)
        if totals.before > self._balancing.threshold:
            return
        wanted = {i: balanced(load, placed) for i, (placed, load) in enumerate(zip(old, self._loads, strict=True))}
        changed = [(i, placed) for i, placed in wanted.items() if placed != old[i]]
        step = self._balancing.chunk or max(1, len(changed))
        self._moves = [_Move(dict(changed[first : first + step])) for first in range(0, len(changed), step)]
        if self._moves:
            self._load(self._moves[0])

    def _load(self, move: _Move) -> None:
        threading.Thread(target=self._prepare, args=(move,), name="expert-loader", daemon=True).start()

    def _prepare(self, move: _Move) -> None:
        try:
            move.puts = [self._layers[layer].prepare(placed) for layer, placed in move.placements.items()]
            move.state = _READY
        except BaseException as error:  # noqa: BLE001 - told to all ranks, which stay as they are then
            move.error = f"{type(error).__name__}: {error}"
            move.state = _FAILED

    def _meet(self, move: _Move) -> None:
        told = self._group.all_gather(torch.tensor([move.state, move.digest]))
        states, digests = told[:, 0].tolist(), told[:, 1].tolist()
        if _FAILED in states or len(set(digests)) > 1:
            _log.error("Experts stay where they are: %s", move.error or "another rank could not load what it lacks.")
            self._moves = []
        elif _LOADING not in states:
            self._put(move)

    def _put(self, move: _Move) -> None:
        totals = self.totals
        for layer, placed in move.placements.items():
            totals.moved += len(moves(self._layers[layer].placement, placed))
        for put in move.puts:
            put()
        del self._moves[0]
        if self._moves:
            self._load(self._moves[0])
            return
        totals.rebalances += 1
        totals.after = _mean_balancedness([layer.placement for layer in self._layers], self._loads)
        if self._group.rank == 0:
            _log.info(
                "Experts are balanced. balancedness: %.3f -> %.3f, moved in all: %d, step: %d",
                totals.before,
                totals.after,
                totals.moved,
                self._steps,
            )


def _mean_balancedness(placements: Sequence[Placement], loads: Sequence[Sequence[int]]) -> float:
    found = [placed.balancedness(load) for placed, load in zip(placements, loads, strict=True)]
    return sum(found) / len(found)
