"""Nobody waits for a patience to run out: what goes wrong is noticed, and answered at once."""

from __future__ import annotations

from moonlang.base.clock import NS_PER_S
from moonlang.core.messages import TokenDelta
from moonlang.sim.checkers.watch import Watch
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.violation import Violation

_MOST_NS = 30 * NS_PER_S  # longer than all the work of a case takes, shorter than the patience of most


class Waits(Watch[PdWorld]):
    """Time from the sending of a request, or from the end of the last trouble, to its end."""

    def on_delta(self, world: PdWorld, delta: TokenDelta) -> None:
        client = world.clients[delta.rid]
        since_ns = max(client.sent_ns, world.calm_ns)
        if world.case.forgets:
            return  # an end that is forgotten is only noticed when the patience is at an end
        if delta.finish is not None and world.now_ns - since_ns > _MOST_NS:
            raise Violation("waits", f"{delta.rid} ends {(world.now_ns - since_ns) / NS_PER_S:.1f} s after all is calm")
