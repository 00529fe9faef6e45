"""Instances this one has been connected to, and what becomes of one that is out of reach.

up      its connection stands and something was heard of it lately
silent  nothing was heard for a while: it is stopped, or the network is; it may come back, and may still write. On
        the same host one sees whether it is stopped or only gets no core: then there is more patience
lost    the connection has broken; the address is asked again and again who is there
gone    nobody listens at its address any more, or another instance does, or its host has been out of reach for
        long: none of its writes is on its way; it is forgotten
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.process_state import can_run
from moonlang.core.pairing import KvCard, Lost
from moonlang.disaggregation.connection import Address, Connection

SILENT_NS = 800 * NS_PER_MS
STARVED_NS = 10 * NS_PER_S  # for a process of this host that could run, but gets no core
ASK_AGAIN_NS = 250 * NS_PER_MS
OUT_OF_REACH_NS = 30 * NS_PER_S  # longer than any transport keeps trying to deliver what was sent before
GRACE_NS = 250 * NS_PER_MS  # after the end of its process, for what lies in buffers of the network
NO_NETWORK = ("local", "fake")  # backends whose writes end with the process


class Answer(NamedTuple):
    """What came of asking at an address. instance: who said he is there, "" for nobody; why: what went wrong.
    refused: nobody listens there; reached: somebody took the connection, whether he spoke or not."""

    instance: str
    why: str = ""
    refused: bool = False
    reached: bool = True


class Reach:
    """Instances whose control connection stands and is not silent. Written by the link, read by any thread."""

    def __init__(self) -> None:
        self._instances: frozenset[str] = frozenset()

    def __call__(self, instance: str) -> bool:
        return instance in self._instances

    def set(self, instances: frozenset[str]) -> None:
        self._instances = instances


@dataclass(slots=True)
class Peer:
    """One instance. address: where it listens. unsure: nothing was heard of it since this thread has not run for a
    while. ask_ns: when to ask again who is there; None: an answer is awaited.
    away_ns: since when its host gives no sign of life; gone_ns: when to say that it is gone, 0: not known to be."""

    card: KvCard
    address: Address
    connection: Connection | None
    silent: bool = False
    unsure: bool = False
    ask_ns: int | None = 0
    away_ns: int = 0
    gone_ns: int = 0


class Peers:
    """Owned by the link's thread. emit: called with every Lost; reach: told who is up whenever that changes."""

    def __init__(self, reach: Reach, emit: Callable[[Lost], None], *, host: str) -> None:
        """host: as on our own card; "" when other processes of it cannot be told."""
        self._host = host
        self._reach = reach
        self._emit = emit
        self._peers: dict[str, Peer] = {}

    @property
    def known(self) -> bool:
        return bool(self._peers)

    def connection(self, instance: str) -> Connection | None:
        """The connection to an instance, if one stands."""
        peer = self._peers.get(instance)
        return peer.connection if peer is not None else None

    def card(self, instance: str) -> KvCard | None:
        """Of an instance that is known."""
        peer = self._peers.get(instance)
        return peer.card if peer is not None else None

    def joined(self, connection: Connection, address: Address) -> Connection | None:
        """An instance is connected, maybe again; the older connection that this one replaces."""
        assert connection.hello is not None
        card = connection.hello.card
        peer = self._peers.get(card.instance)
        before = peer.connection if peer is not None else None
        self._peers[card.instance] = Peer(card, address, connection)
        self._mark()
        return before

    def heard(self, connection: Connection) -> None:
        """A sign of life."""
        peer = self._peers.get(connection.instance)
        if peer is not None and (peer.silent or peer.unsure) and peer.connection is connection:
            peer.silent = peer.unsure = False
            self._mark()

    def broke(self, connection: Connection, now_ns: int) -> bool:
        """A connection has ended. True when it was that of a peer, which is lost now."""
        peer = self._peers.get(connection.instance)
        if peer is None or peer.connection is not connection:
            return False
        peer.connection = None
        peer.ask_ns, peer.away_ns = now_ns, now_ns
        self._silence(peer)
        return True

    def listen(self, now_ns: int) -> None:
        """Notice who has fallen silent, and who has been gone long enough."""
        for instance, peer in list(self._peers.items()):
            if peer.connection is not None:
                quiet_ns = now_ns - peer.connection.heard_ns
                if quiet_ns > self._patience_ns(peer, quiet_ns):
                    self._silence(peer)
            elif not peer.gone_ns and now_ns - peer.away_ns > OUT_OF_REACH_NS:
                peer.gone_ns = now_ns
            if peer.gone_ns and now_ns >= peer.gone_ns:
                self._emit(Lost(instance, "gone"))
                del self._peers[instance]

    def _patience_ns(self, peer: Peer, quiet_ns: int) -> int:
        """How long this peer may be quiet. It is looked at only when it has been for a while."""
        hello = peer.connection.hello if peer.connection is not None else None
        if quiet_ns <= SILENT_NS or hello is None or not self._host or peer.card.host != self._host:
            return SILENT_NS
        return STARVED_NS if can_run(hello.pid) else SILENT_NS

    def stalled(self, by_ns: int) -> None:
        """This thread has not run for a while: what it has not heard, others may have said.

        Until something is heard of a peer again it counts as out of reach: much may have happened meanwhile.
        """
        for peer in self._peers.values():
            if peer.connection is not None:
                peer.connection.heard_ns += by_ns
                peer.unsure |= by_ns > SILENT_NS
        self._mark()

    def to_ask(self, now_ns: int) -> list[Peer]:
        """Lost peers whose address is to be asked now; each until `answered`."""
        due = [
            peer
            for peer in self._peers.values()
            if peer.connection is None and not peer.gone_ns and peer.ask_ns is not None and now_ns >= peer.ask_ns
        ]
        for peer in due:
            peer.ask_ns = None
        return due

    def answered(self, instance: str, answer: Answer, now_ns: int) -> Peer | None:
        """The address of a lost peer has been tried. The peer when it still lives there."""
        peer = self._peers.get(instance)
        if peer is None or peer.connection is not None:
            return None
        peer.ask_ns = now_ns + ASK_AGAIN_NS
        if answer.refused or answer.instance not in ("", instance):
            peer.gone_ns = now_ns + (0 if peer.card.backend in NO_NETWORK else GRACE_NS)
            return None
        if answer.reached:
            peer.away_ns = now_ns  # its process may be stopped, but is there
        return peer if answer.instance else None

    def _silence(self, peer: Peer) -> None:
        if not peer.silent:
            peer.silent = True
            self._mark()
            self._emit(Lost(peer.card.instance, "silent"))

    def _mark(self) -> None:
        self._reach.set(
            frozenset(
                name
                for name, peer in self._peers.items()
                if peer.connection is not None and not (peer.silent or peer.unsure)
            )
        )
