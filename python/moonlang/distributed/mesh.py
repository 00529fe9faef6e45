"""Which ranks belong together. Pure arithmetic.

World ranks are laid out [dp][pp][tp], tp fastest: the ranks of a tensor-parallel group are neighbours, and so are, on
the nodes of a cluster, those that talk most. Experts are spread over the tp ranks: a group of ep ranks, which divides
tp, holds all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moonlang.base.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a world rank is in each dimension."""

    dp: int
    pp: int
    tp: int
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The sizes of all dimensions. ConfigError when they do not go together."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp, self.ep) < 1:
            raise ConfigError("Parallel sizes are at least 1.", hint="See --tp-size, --pp-size, --dp-size, --ep-size.")
        if self.tp % self.ep:
            raise ConfigError(
                f"--ep-size {self.ep} does not divide --tp-size {self.tp}.",
                hint="Experts are spread over the ranks of tensor parallelism.",
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> Place:
        """Of a world rank."""
        rest, tp = divmod(rank, self.tp)
        dp, pp = divmod(rest, self.pp)
        return Place(dp=dp, pp=pp, tp=tp, ep=tp % self.ep)

    def rank(self, *, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The world rank at a place."""
        return (dp * self.pp + pp) * self.tp + tp

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that share the layers of `rank`."""
        at = self.place(rank)
        return tuple(self.rank(dp=at.dp, pp=at.pp, tp=tp) for tp in range(self.tp))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that hold the layers before and after those of `rank`, in the order of layers."""
        at = self.place(rank)
        return tuple(self.rank(dp=at.dp, pp=pp, tp=at.tp) for pp in range(self.pp))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that hold copies of what `rank` holds."""
        at = self.place(rank)
        return tuple(self.rank(dp=dp, pp=at.pp, tp=at.tp) for dp in range(self.dp))

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """World ranks among which the experts are spread."""
        at = self.place(rank)
        first = at.tp - at.ep
        return tuple(self.rank(dp=at.dp, pp=at.pp, tp=first + ep) for ep in range(self.ep))


def node_ranks(world: int, nodes: int, node: int) -> range:
    """The world ranks that run on one of `nodes` nodes. ConfigError when they cannot be dealt out evenly."""
    if world % nodes:
        raise ConfigError(
            f"{world} ranks cannot be spread evenly over --nnodes {nodes}.", hint="Change --tp-size or --nnodes."
        )
    if not 0 <= node < nodes:
        raise ConfigError(f"--node-rank {node} is not one of --nnodes {nodes}.", hint="Nodes are counted from 0.")
    each = world // nodes
    return range(node * each, (node + 1) * each)
