"""Who may write where: a page that decode has offered is written for that room only, and used by nobody until it is
certain that nothing will be written any more.

The ledger is kept from what the servers say to each other, not from what the schedulers believe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moonlang.core.pairing import Drained, Heard, Landed, Lost, PairEvent, PairMessage, Pushed, Want
from moonlang.core.plan import StepPlan
from moonlang.sim.pd.checkers.watch import PairWatch
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.violation import Violation

_NAME = "grants"


@dataclass(slots=True)
class _Grant:
    """One room on one decode instance. source: the instance that may write; closed: it may not any more.

    pushed: indexes of the pushes that decode has heard of; landed: how many it has been told there are.
    """

    source: str
    pages: tuple[int, ...]
    closed: bool = False
    written: dict[int, None] = field(default_factory=dict)
    pushed: dict[int, None] = field(default_factory=dict)
    landed: int | None = None

    @property
    def is_whole(self) -> bool:
        """Decode has been told that everything is there, and everything is."""
        return self.landed is not None and len(self.pushed) == self.landed and len(self.written) == len(self.pages)


class Grants(PairWatch):
    """From the first Want of a room to Drained, Landed or the end of the prefill instance its pages are granted."""

    def __init__(self) -> None:
        self._grants: dict[tuple[str, int], _Grant] = {}  # (decode instance, room)
        self._held: dict[tuple[str, int], tuple[int, _Grant]] = {}  # (decode instance, page) -> open grant
        self._tables: dict[tuple[str, int], list[int]] = {}  # (instance, slot) -> page table of its tenant

    def on_said(self, world: PdWorld, server: Server, instance: str, body: PairMessage) -> None:
        if not isinstance(body, Want) or (server.instance, body.room) in self._grants:
            return
        grant = self._grants[server.instance, body.room] = _Grant(instance, body.pages)
        for page in body.pages:
            key = (server.instance, page)
            other = self._held.get(key)
            if other is not None:
                raise Violation(_NAME, f"{server.instance} offers page {page} to rooms {other[0]} and {body.room}")
            self._held[key] = (body.room, grant)

    def on_heard(self, world: PdWorld, server: Server, event: PairEvent) -> None:
        if isinstance(event, Lost) and event.fate == "gone":
            for (instance, room), grant in list(self._grants.items()):
                if instance == server.instance and grant.source == event.instance:
                    self._close(server, room, grant)
        elif isinstance(event, Heard):
            grant = self._grants.get((server.instance, event.body.room))
            if grant is not None and grant.source == event.card.instance:
                self._note(server, grant, event.body)

    def on_written(self, world: PdWorld, server: Server, target: Server, room: int, page: int) -> None:
        grant = self._grants.get((target.instance, room))
        if grant is None or grant.source != server.instance or page not in grant.pages:
            raise Violation(_NAME, f"{server.instance} writes to page {page} of {target.instance}, nobody has asked")
        if grant.closed:
            raise Violation(_NAME, f"{server.instance} writes to page {page} of {target.instance} after the end")
        grant.written[page] = None

    def on_plan(self, world: PdWorld, server: Server, plan: StepPlan) -> None:
        if server.site.role != "decode":
            return
        for start in plan.starts:
            self._tables[server.instance, start.slot] = []
        for row in plan.rows:
            table = self._tables[server.instance, row.slot]
            table[row.page_at : row.page_at + len(row.pages)] = row.pages
            for page in row.pages:
                held = self._held.get((server.instance, page))
                if held is not None:
                    raise Violation(_NAME, f"{server.instance} uses page {page}, to which room {held[0]} may write")
        for start in plan.starts:
            self._check_start(world, server, plan, start.slot)

    def at_end(self, world: PdWorld) -> None:
        living = {server.instance for server in world.living()}
        for (instance, room), grant in self._grants.items():
            if grant.pages and not grant.closed and instance in living:
                raise Violation(_NAME, f"{instance} has not heard the end of room {room}")

    def _note(self, server: Server, grant: _Grant, body: PairMessage) -> None:
        if isinstance(body, Pushed):
            grant.pushed[body.index] = None
        elif isinstance(body, Landed):
            grant.landed = body.pushes
            self._close(server, body.room, grant)
        elif isinstance(body, Drained):
            self._close(server, body.room, grant)

    def _close(self, server: Server, room: int, grant: _Grant) -> None:
        grant.closed = True
        for page in grant.pages:
            held = self._held.get((server.instance, page))
            if held is not None and held[0] == room:
                del self._held[server.instance, page]

    def _check_start(self, world: PdWorld, server: Server, plan: StepPlan, slot: int) -> None:
        """A request that starts behind its whole prompt has it from outside: it must have come whole."""
        start = next(start for start in plan.starts if start.slot == slot)
        row = next(row for row in plan.rows if row.slot == slot)
        rid = server.rid_of(start.epoch)
        grant = self._grants.get((server.instance, world.router.attempts[rid].room))
        if grant is None or row.start != start.prompt_len or len(start.tokens) != start.prompt_len + 1:
            return
        table = self._tables[server.instance, slot]
        if any(page in grant.pages for page in table) and not grant.is_whole:
            raise Violation(_NAME, f"{rid} starts on {server.instance} with {grant}")
