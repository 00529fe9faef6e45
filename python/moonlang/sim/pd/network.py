"""Control connections between servers: found by address, in order, and with everything that can happen to them.

The contract of a connection (`core.ports.PeerLink`) is that messages come in order and once. Beyond it the simulator
loses and repeats messages where a case says so: what both sides say must not depend on the contract.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moonlang.base.clock import NS_PER_MS
from moonlang.core.pairing import (
    Heard,
    KvCard,
    Linked,
    Lost,
    PairEvent,
    PairMessage,
    PeerSpec,
    Unreachable,
)
from moonlang.sim.agenda import Agenda
from moonlang.sim.pd.process import Process

Address = tuple[str, int]

_SILENCE_NS = 900 * NS_PER_MS  # without a sign of life for so long a peer counts as silent
_RETRY_NS = 40 * NS_PER_MS
_DIAL_NS = 1000 * NS_PER_MS  # who does not answer for so long is unreachable
_LINGER_NS = NS_PER_MS  # what was on the wire when its sender died arrives within this time
LATE_COPY_NS = 300 * NS_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class NetSpec:
    """latency_ns: of a message, at least and at most. lost, repeated: shares of messages. late_copies: the repeated one
    comes out of order. quick_death: share of deaths that are known at once, not after a silence."""

    latency_ns: tuple[int, int]
    lost: float = 0.0
    repeated: float = 0.0
    late_copies: bool = False
    quick_death: float = 1.0


class Connection:
    """Between two links. serial: counts its (re)connections; what was sent in an earlier one is lost."""

    def __init__(self, a: SimLink, b: SimLink) -> None:
        self.ends = (a, b)
        self.up = True
        self.serial = 0
        self.clogged_until_ns = 0
        self.last_ns = {a.instance: 0, b.instance: 0}  # by receiver: when its newest message arrives

    def other(self, link: SimLink) -> SimLink:
        return self.ends[1] if self.ends[0] is link else self.ends[0]

    def drop(self) -> None:
        self.up = False
        self.serial += 1


class SimLink:
    """`PeerLink` of one server. wake: called when `recv` has something."""

    def __init__(self, network: Network, process: Process, card: KvCard, wake: Callable[[], None]) -> None:
        self.instance = card.instance
        self.card = card
        self.process = process
        self.connections: dict[str, Connection] = {}
        self._network = network
        self._wake = wake
        self._inbox: list[PairEvent] = []

    def open(self, spec: PeerSpec, deadline_ns: int) -> None:
        self._network.dial(self, spec, deadline_ns)

    def send(self, instance: str, body: PairMessage) -> None:
        connection = self.connections.get(instance)
        if connection is not None and connection.up:
            self._network.carry(connection, self, body)

    def recv(self) -> list[PairEvent]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def is_up(self, instance: str) -> bool:
        """Whether the peer is connected, as far as this side knows."""
        connection = self.connections.get(instance)
        return connection is not None and connection.up

    def stalls(self, instance: str) -> bool:
        """Whether nothing gets through to the peer at present."""
        connection = self.connections.get(instance)
        return connection is not None and connection.clogged_until_ns > self.process.now_ns

    def post(self, event: PairEvent) -> None:
        self._inbox.append(event)
        self._wake()


class Network:
    """Who can be reached where. `tell` traces."""

    def __init__(
        self, agenda: Agenda, rng: random.Random, spec: NetSpec, tell: Callable[..., None] = lambda *what: None
    ) -> None:
        self.sites: dict[Address, SimLink] = {}
        self.spec = spec
        self._agenda = agenda
        self._rng = rng
        self._tell = tell

    def latency_ns(self) -> int:
        return self._rng.randint(*self.spec.latency_ns)

    # ---- connections

    def dial(self, caller: SimLink, spec: PeerSpec, deadline_ns: int) -> None:
        give_up_ns = min(deadline_ns, self._agenda.now_ns + _DIAL_NS)
        caller.process.after(2 * self.latency_ns(), lambda: self._try(caller, spec, give_up_ns))

    def _try(self, caller: SimLink, spec: PeerSpec, give_up_ns: int) -> None:
        target = self.sites.get((spec.host, spec.port))
        if target is None or target.process.dead:
            caller.post(Unreachable(spec.room, "Connection refused."))
            return
        connection = caller.connections.get(target.instance)
        if connection is None and target.process.responds:
            connection = Connection(caller, target)
            caller.connections[target.instance] = target.connections[caller.instance] = connection
        if connection is not None and connection.up:
            caller.post(Linked(spec.room, target.card))
        elif caller.process.now_ns >= give_up_ns:
            caller.post(Unreachable(spec.room, "No answer."))
        else:
            caller.process.after(_RETRY_NS, lambda: self._try(caller, spec, give_up_ns))

    def carry(self, connection: Connection, source: SimLink, body: PairMessage) -> None:
        """Deliver a message: now and then not at all, or twice."""
        target = connection.other(source)
        if self._rng.random() < self.spec.lost:
            self._tell("lost", source.instance, target.instance, body)
            return
        now_ns = self._agenda.now_ns
        at_ns = max(now_ns + self.latency_ns(), connection.last_ns[target.instance], connection.clogged_until_ns)
        connection.last_ns[target.instance] = at_ns
        self._deliver(connection, source, target, body, at_ns - now_ns)
        if self._rng.random() < self.spec.repeated:
            extra_ns = self._rng.randrange(LATE_COPY_NS) if self.spec.late_copies else 0
            self._deliver(connection, source, target, body, at_ns - now_ns + extra_ns)

    def _deliver(
        self, connection: Connection, source: SimLink, target: SimLink, body: PairMessage, delay_ns: int
    ) -> None:
        serial = connection.serial

        def arrive() -> None:
            if connection.serial == serial and target.connections.get(source.instance) is connection:
                self._tell("heard", source.instance, target.instance, body)
                target.post(Heard(source.card, body))

        target.process.after(delay_ns, arrive)

    # ---- what can happen to them

    def reset(self, connection: Connection) -> None:
        """The connection breaks and is made again a little later."""
        if connection.up:
            connection.drop()
            for end in connection.ends:
                self._lose(end, connection.other(end), "silent", self.latency_ns())
            self._redial(connection, self._rng.randint(1, 200) * NS_PER_MS)

    def clog(self, connection: Connection, duration_ns: int) -> None:
        """Nothing gets through for a while; both sides take each other for silent when it lasts."""
        now_ns = self._agenda.now_ns
        connection.clogged_until_ns = max(connection.clogged_until_ns, now_ns + duration_ns)
        if duration_ns > _SILENCE_NS:
            self._agenda.at(now_ns + _SILENCE_NS, lambda: self._silence(connection, connection.ends))
            self._redial(connection, duration_ns)

    def stopped(self, link: SimLink) -> None:
        """The process of `link` has just been stopped: its peers notice when it stays silent."""
        stops = link.process.stops

        def notice(connection: Connection) -> None:
            if link.process.stopped and link.process.stops == stops:
                self._silence(connection, (connection.other(link), link))
                self._redial(connection, _RETRY_NS)

        for connection in link.connections.values():
            self._agenda.at(self._agenda.now_ns + _SILENCE_NS, lambda c=connection: notice(c))

    def died(self, link: SimLink) -> None:
        """The process of `link` is dead: its peers are told, at once or after a silence."""
        for connection in link.connections.values():
            peer = connection.other(link)
            was_up = connection.up
            connection.drop()
            if self._rng.random() < self.spec.quick_death:
                self._lose(peer, link, "gone", _LINGER_NS + self.latency_ns())
                continue
            if was_up:
                self._lose(peer, link, "silent", _SILENCE_NS)
            self._lose(peer, link, "gone", _SILENCE_NS + self._rng.randint(1, 2000) * NS_PER_MS)

    def _silence(self, connection: Connection, who: tuple[SimLink, ...]) -> None:
        if connection.up:
            connection.drop()
            for end in who:
                self._lose(end, connection.other(end), "silent", 0)

    def _lose(self, link: SimLink, peer: SimLink, fate: Literal["silent", "gone"], delay_ns: int) -> None:
        def post() -> None:
            self._tell("lost peer", peer.instance, fate, "for", link.instance)
            if fate == "gone" and link.connections.pop(peer.instance, None) is None:
                return
            link.post(Lost(peer.instance, fate))

        link.process.after(delay_ns, post)

    def _redial(self, connection: Connection, delay_ns: int) -> None:
        """Connect again when both ends respond; for ever, unless one of them dies."""

        def again() -> None:
            if connection.up or any(end.process.dead for end in connection.ends):
                return
            clogged = connection.clogged_until_ns > self._agenda.now_ns
            if clogged or not all(end.process.responds for end in connection.ends):
                self._agenda.at(self._agenda.now_ns + _RETRY_NS, again)
            else:
                connection.up = True

        self._agenda.at(self._agenda.now_ns + delay_ns, again)
