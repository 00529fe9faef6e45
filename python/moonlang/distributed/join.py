"""A rank takes its seat: it meets those who hold the other shards of its layers, and its neighbours in the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from moonlang.base import registry
from moonlang.config.shard import Shard
from moonlang.config.stage import Stage
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.distributed.mesh import Mesh
from moonlang.distributed.pipe import Pipe


@dataclass(frozen=True, slots=True)
class Joined:
    """What a rank holds, and whom it computes it with. group: None without other shards; pipe: None with one stage.

    experts: its share of them; expert_group: with whom it shares them, None when these are the ones of `group`.
    """

    shard: Shard
    stage: Stage
    group: Group | None
    pipe: Pipe | None = None
    experts: Shard | None = None
    expert_group: Group | None = None


def join(seat: Seat) -> Joined:
    """Waits until all have come. PeerError when a rank does not."""
    backend = registry.find("distributed", seat.backend).BACKEND
    mesh = Mesh(tp=seat.replica_size // seat.stages, pp=seat.stages, dp=seat.replicas)
    at = mesh.place(seat.rank)
    shard, stage = Shard(at.tp, mesh.tp), Stage(at.pp, mesh.pp)
    if mesh.world == mesh.tp:
        return Joined(shard, stage, backend(seat))

    def meet(name: str, rank: int, size: int) -> Group:
        return backend(msgspec.structs.replace(seat, rank=rank, size=size, stages=1, replicas=1, part=name))

    def link(first: int, rank: int) -> Group:
        """The ranks of the same shard in stage `first` and the next one."""
        return meet(f"link{first}-{at.tp}", rank, 2)

    everyone = backend(seat)
    if mesh.dp > 1:
        group = meet(f"replica{at.dp}", at.tp, mesh.tp) if mesh.tp > 1 else None
        return Joined(shard, stage, group, None, Shard(seat.rank, seat.size), everyone)
    group = backend(seat.of_stage()) if mesh.tp > 1 else None
    before = None if stage.is_first else link(at.pp - 1, 1)
    after = None if stage.is_last else link(at.pp, 0)
    return Joined(shard, stage, group, Pipe(before, after, everyone))
