"""A checker that looks at nothing: the others override what they care about."""

from __future__ import annotations

from moonlang.core.pairing import PairEvent, PairMessage
from moonlang.core.plan import StepPlan
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.world import PdWorld


class PairWatch:
    """Does nothing at each hook of `world.PairChecker`."""

    def on_said(self, world: PdWorld, server: Server, instance: str, body: PairMessage, /) -> None:
        return None

    def on_heard(self, world: PdWorld, server: Server, event: PairEvent, /) -> None:
        return None

    def on_written(self, world: PdWorld, server: Server, target: Server, room: int, page: int, /) -> None:
        return None

    def on_plan(self, world: PdWorld, server: Server, plan: StepPlan, /) -> None:
        return None

    def on_step(self, world: PdWorld, server: Server, /) -> None:
        return None

    def at_end(self, world: PdWorld, /) -> None:
        return None
