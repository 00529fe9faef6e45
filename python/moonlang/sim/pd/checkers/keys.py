"""KV goes only to requests of the extra key (LoRA, cache salt) it was computed under, also across servers."""

from __future__ import annotations

from moonlang.core.plan import StepPlan
from moonlang.sim.checkers.isolation import Isolation
from moonlang.sim.pd.checkers.watch import PairWatch
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.world import PdWorld


class Keys(PairWatch):
    """`Isolation` for each server; a page that is written from outside belongs to the key of the room."""

    def __init__(self) -> None:
        self._isolation: dict[str, Isolation] = {}

    def on_written(self, world: PdWorld, server: Server, target: Server, room: int, page: int) -> None:
        key = world.router.rooms[room].client.script.extra_key
        self._of(target).arrived(page, key)

    def on_plan(self, world: PdWorld, server: Server, plan: StepPlan) -> None:
        self._of(server).on_plan(server, plan)

    def _of(self, server: Server) -> Isolation:
        return self._isolation.setdefault(server.instance, Isolation())
