"""Pages never mix between servers of different weights."""

from __future__ import annotations

from moonlang.sim.pd.checkers.watch import PairWatch
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.violation import Violation


class Weights(PairWatch):
    """A page is written only by a server of the same fingerprint."""

    def on_written(self, world: PdWorld, server: Server, target: Server, room: int, page: int) -> None:
        source, sink = server.site.fingerprint, target.site.fingerprint
        if source != sink:
            raise Violation("weights", f"{server.instance} of {source} writes to {target.instance} of {sink}")
