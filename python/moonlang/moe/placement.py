"""Where the experts of a layer are: which expert is in each slot of each rank, some of them in several.

Copies of an expert share its tokens, so a busy expert with many copies is as light as an idle one. Answers never depend
on a placement. Everything here is a pure function of its arguments, so ranks that know the same loads decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moonlang.config.shard import Shard

_SLACK = 0.05  # of a rank's mean load: so much more may be on the rank that has an expert already


class Copy(NamedTuple):
    """Of an expert: the rank, and its number among the slots there."""

    rank: int
    slot: int


class Move(NamedTuple):
    """A slot that has to get the weights of an expert."""

    rank: int
    slot: int
    expert: int


@dataclass(frozen=True, slots=True)
class Placement:
    """slots: by rank, the expert in each of its slots. ValueError: one of the experts 0, 1, ... is nowhere."""

    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        here = {expert for held in self.slots for expert in held}
        if here != set(range(len(here))):
            raise ValueError(f"An expert is nowhere, or there is none of its number: {self.slots}")

    @property
    def experts(self) -> int:
        """How many different ones there are."""
        return 1 + max(max(held, default=-1) for held in self.slots)

    def copies(self, expert: int) -> list[Copy]:
        """By rank, then slot."""
        return self.all_copies()[expert]

    def all_copies(self) -> list[list[Copy]]:
        """By expert."""
        found: list[list[Copy]] = [[] for _ in range(self.experts)]
        for rank, held in enumerate(self.slots):
            for slot, expert in enumerate(held):
                found[expert].append(Copy(rank, slot))
        return found

    def rank_loads(self, load: Sequence[float]) -> list[float]:
        """load: by expert -> by rank, when the copies of an expert have equal shares of its load."""
        each = [load[expert] / len(copies) for expert, copies in enumerate(self.all_copies())]
        return [sum(each[expert] for expert in held) for held in self.slots]

    def balancedness(self, load: Sequence[float]) -> float:
        """The mean load of the ranks over the highest one: 1 is perfect. 1 without any load."""
        loads = self.rank_loads(load)
        return sum(loads) / len(loads) / max(loads) if max(loads) > 0 else 1.0


def even(experts: int, ranks: int, redundant: int = 0) -> Placement:
    """Each rank has its share (`Shard.part`) of the experts and, behind them, of one more copy of the first ones.

    ValueError: some rank would have none.
    """
    if experts + redundant < ranks:
        raise ValueError(f"{ranks} ranks cannot share {experts} experts and {redundant} more copies.")
    all_slots = [slot % experts for slot in range(experts + redundant)]
    parts = [Shard(rank, ranks).part(len(all_slots)) for rank in range(ranks)]
    return Placement(tuple(tuple(all_slots[part.start : part.stop]) for part in parts))


def balanced(load: Sequence[float], old: Placement) -> Placement:
    """A placement with the slots of `old` that spreads `load` (by expert) better; `old` when this one does not.

    Greedy: a further copy goes to the expert with the highest load for each of its copies; then the heaviest copy goes
    first, to the rank with the least load that has none of the expert. What can stay in its slot stays.
    """
    sizes = [len(held) for held in old.slots]
    counts = _shared_out(load, sum(sizes), len(sizes))
    held = _packed(load, counts, old)
    new = _settled(_renumbered(held, old), old)
    return new if max(new.rank_loads(load)) < max(old.rank_loads(load)) else old


def moves(old: Placement, new: Placement) -> list[Move]:
    """Of all slots that have another expert in `new`. Both have the same slots."""
    return [
        Move(rank, slot, expert)
        for rank, (before, after) in enumerate(zip(old.slots, new.slots, strict=True))
        for slot, expert in enumerate(after)
        if before[slot] != expert
    ]


def _heaviest(experts: Iterable[int], load: Sequence[float]) -> list[int]:
    """Highest load first, equal ones by number."""
    return sorted(experts, key=lambda expert: (-load[expert], expert))


def _shared_out(load: Sequence[float], slots: int, ranks: int) -> list[int]:
    """By expert, how many copies it gets. More than there are ranks only when all have as many."""
    counts = [1] * len(load)
    for _ in range(slots - len(load)):
        few = [expert for expert, count in enumerate(counts) if count < ranks] or range(len(counts))
        busiest = max(few, key=lambda expert: (load[expert] / counts[expert], -counts[expert], -expert))
        counts[busiest] += 1
    return counts


def _packed(load: Sequence[float], counts: Sequence[int], old: Placement) -> list[list[int]]:
    """By rank, the experts in its slots, of which there are as many as in `old`."""
    sizes, had = [len(held) for held in old.slots], [set(held) for held in old.slots]
    each = [total / count for total, count in zip(load, counts, strict=True)]
    held: list[list[int]] = [[] for _ in sizes]
    loads = [0.0] * len(sizes)
    slack = _SLACK * sum(load) / len(sizes)
    for expert in _heaviest(range(len(counts)), each):
        for _ in range(counts[expert]):
            free = [rank for rank, size in enumerate(sizes) if len(held[rank]) < size]
            apart = [rank for rank in free if expert not in held[rank]]
            choice = apart or free
            enough = min(loads[rank] for rank in choice) + slack
            home = [rank for rank in choice if loads[rank] <= enough and expert in had[rank]]
            rank = min(home or choice, key=lambda rank: (loads[rank], len(held[rank]), rank))
            held[rank].append(expert)
            loads[rank] += each[expert]
            if not apart:
                _swap_apart(rank, held, loads, each)
    return held


def _swap_apart(rank: int, held: list[list[int]], loads: list[float], each: Sequence[float]) -> None:
    """The last expert of `rank` is there twice: swap it for one of another rank, where both are alone."""
    expert = held[rank][-1]
    for other, theirs in enumerate(held):
        swapped = [slot for slot, candidate in enumerate(theirs) if candidate not in held[rank]]
        if expert not in theirs and swapped:
            slot = min(swapped, key=lambda slot: (abs(each[theirs[slot]] - each[expert]), slot))
            change = each[theirs[slot]] - each[expert]
            held[rank][-1], theirs[slot] = theirs[slot], expert
            loads[rank] += change
            loads[other] -= change
            return


def _renumbered(held: list[list[int]], old: Placement) -> list[list[int]]:
    """The same groups of experts on other ranks of as many slots: those that have most of a group's already."""
    found: list[list[int]] = [[] for _ in held]
    groups, ranks = list(range(len(held))), list(range(len(held)))
    alike = [[_alike(group, before) for before in old.slots] for group in held]
    while groups:
        pairs = [(group, rank) for group in groups for rank in ranks if len(held[group]) == len(old.slots[rank])]
        group, rank = max(pairs, key=lambda pair: (alike[pair[0]][pair[1]], -pair[1], -pair[0]))
        found[rank] = held[group]
        groups.remove(group)
        ranks.remove(rank)
    return found


def _alike(group: Sequence[int], before: Sequence[int]) -> int:
    return len(set(group) & set(before))


def _settled(held: list[list[int]], old: Placement) -> Placement:
    """Every expert that was on its rank in the slot that it had, the others in those that are left."""
    found: list[tuple[int, ...]] = []
    for new, before in zip(held, old.slots, strict=True):
        coming = list(new)
        slots: list[int | None] = []
        for expert in before:
            stays = expert in coming
            slots.append(expert if stays else None)
            if stays:
                coming.remove(expert)
        rest = iter(sorted(coming))
        found.append(tuple(next(rest) if expert is None else expert for expert in slots))
    return Placement(tuple(found))
