"""Who is not wanted any more lets go: a Release is answered soon, a peer that is lost is not waited for; and nobody is
given up for no reason."""

from __future__ import annotations

from moonlang.base.clock import NS_PER_S
from moonlang.core.pairing import Drained, Heard, Linked, Lost, PairEvent, PairMessage, Refuse, Release
from moonlang.sim import inside
from moonlang.sim.pd.checkers.watch import PairWatch
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.violation import Violation

_NAME = "partings"
_MOST_NS = 20 * NS_PER_S  # longer than any hang or delay of a transfer


class Partings(PairWatch):
    """Releases without an answer, by instance and room, since when; and who has been lost by whom."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], int] = {}
        self._lost: dict[str, dict[str, None]] = {}  # by instance
        self._excused: dict[
            tuple[str, str | int], None
        ] = {}  # (instance, peer that it has lost or room that has failed)

    def on_heard(self, world: PdWorld, server: Server, event: PairEvent) -> None:
        lost = self._lost.setdefault(server.instance, {})
        match event:
            case Lost(instance, _):
                lost[instance] = None
                self._excused[server.instance, instance] = None
            case Linked(_, card):
                lost.pop(card.instance, None)
            case Heard(card, body):
                lost.pop(card.instance, None)
                if isinstance(body, Release):
                    self._open.setdefault((server.instance, body.room), world.now_ns)
                elif isinstance(body, Refuse | Drained):
                    self._excused[server.instance, body.room] = None
            case _:
                pass

    def on_said(self, world: PdWorld, server: Server, instance: str, body: PairMessage) -> None:
        if isinstance(body, Release) and body.error and not self._may_give_up(world, server, instance, body.room):
            raise Violation(_NAME, f"{server.instance} gives up room {body.room} for no reason: {body.error}")
        if isinstance(body, Drained):
            since_ns = self._open.pop((server.instance, body.room), world.now_ns)
            if world.now_ns - since_ns > _MOST_NS:
                raise Violation(_NAME, f"{server.instance} lets go of room {body.room} at {world.now_ns} ns only")

    def _may_give_up(self, world: PdWorld, server: Server, instance: str, room: int) -> bool:
        """Whether something has happened to this room, to its peer or to its client."""
        attempt, transfer = world.router.rooms[room], world.case.transfer
        client = attempt.client
        waited_ns = world.now_ns - client.sent_ns
        return (
            attempt.over
            or (server.instance, instance) in self._excused
            or (server.instance, room) in self._excused
            or client.script.timeout_ms > 0
            or waited_ns >= server.site.pairing.patience_ns
            or transfer.failed > 0
            or transfer.corrupt > 0
            or attempt.prefill.site.fingerprint != attempt.decode.site.fingerprint
        )

    def on_step(self, world: PdWorld, server: Server) -> None:
        for instance in self._lost.get(server.instance, ()):
            if inside.waits_for(server.scheduler, instance):
                raise Violation(_NAME, f"{server.instance} waits for {instance}, which it has lost")

    def at_end(self, world: PdWorld) -> None:
        living = {server.instance for server in world.living()}
        left = [key for key in self._open if key[0] in living]
        if left:
            raise Violation(_NAME, f"releases without an answer: {left}")
