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
    """What a rank holds, and whom it computes it with. group: None without other shards; pipe: None with one stage."""

    shard: Shard
    stage: Stage
    group: Group | None
    pipe: Pipe | None


def join(seat: Seat) -> Joined:
    """Waits until all have come. PeerError when a rank does not."""
    backend = registry.find("distributed", seat.backend).BACKEND
    mesh = Mesh(tp=seat.size // seat.stages, pp=seat.stages)
    at = mesh.place(seat.rank)
    shard, stage = Shard(at.tp, mesh.tp), Stage(at.pp, mesh.pp)
    if mesh.pp == 1:
        return Joined(shard, stage, backend(seat), None)

    def meet(name: str, rank: int, size: int) -> Group:
        return backend(msgspec.structs.replace(seat, rank=rank, size=size, stages=1, part=name))

    def link(first: int, rank: int) -> Group:
        """The ranks of the same shard in stage `first` and the next one."""
        return meet(f"link{first}-{at.tp}", rank, 2)

    everyone = backend(seat)
    group = backend(seat.of_stage()) if mesh.tp > 1 else None
    before = None if stage.is_first else link(at.pp - 1, 1)
    after = None if stage.is_last else link(at.pp, 0)
    return Joined(shard, stage, group, Pipe(before, after, everyone))
