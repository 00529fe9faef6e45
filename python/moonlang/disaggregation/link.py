"""PeerLink over TCP: one thread, one connection per pair of instances, nothing that blocks.

Decode connects to prefill. Both listen, so that each can see whether the other is to be reached at the address that it
advertises, and whether its process still lives after a connection has broken. See `frames` for what is said, `rooms`
for how an instance is found, `peers` for what becomes of one that is out of reach.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.core.pairing import (
    Heard,
    KvCard,
    Linked,
    Lost,
    PairEvent,
    PairMessage,
    PeerSpec,
    Release,
    Unreachable,
)
from moonlang.disaggregation import frames
from moonlang.disaggregation.connection import Address, Connection, Stage
from moonlang.disaggregation.finder import Finder
from moonlang.disaggregation.frames import Frame
from moonlang.disaggregation.peers import Answer, Peers, Reach
from moonlang.disaggregation.rooms import Claims, Search, Site
from moonlang.disaggregation.wire import Broke, Came, Wire

BEAT_NS = 200 * NS_PER_MS
GREETING_NS = 2 * NS_PER_S  # for connecting and the exchange of hellos
ASK_NS = 1 * NS_PER_S  # for seeing whether an address answers
_NONCE_BYTES = 32

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """role: "prefill" or "decode". host: as in --host. token: what all instances of a cluster know, "" for none.
    sums: how this instance computes checksums, "off" when it does not."""

    role: str
    host: str
    token: str = ""
    sums: str = "off"


OnAnswer = Callable[[Answer], None]


class TcpLink:
    """A PeerLink. Its methods belong to one thread, the others to the link's own."""

    def __init__(self, card: KvCard, options: LinkOptions, reach: Reach) -> None:
        """ConfigError when the host cannot be listened on."""
        self._card = card
        self._options = options
        self._reach = reach
        self._wakeup = Wakeup()
        self._wire = Wire(options.host, self._wakeup)
        self.address: Address = self._wire.address
        self._events: deque[PairEvent] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands: deque[Callable[[int], None]] = deque()
        self._peers = Peers(reach, self._lost, host=card.host)
        self._search = Search()
        self._claims = Claims()
        self._finder = Finder(self._found)
        self._asks: dict[Connection, OnAnswer] = {}
        self._dialled: dict[Address, Connection] = {}
        self._asked: dict[Connection, set[int]] = {}  # rooms asked for on a connection
        self._broken: BaseException | None = None
        self._stopping = False
        self._turned_ns = monotonic_ns()
        self._thread = threading.Thread(target=self._run, name="peer-link", daemon=True)
        self._thread.start()

    # ---- the owner's thread

    def open(self, spec: PeerSpec, deadline_ns: int) -> None:
        self._command(partial(self._open, spec, deadline_ns))

    def claim(self, room: int) -> None:
        """The request of `room` is here: whoever looks for it may be told."""
        self._command(partial(self._claim, room))

    def send(self, instance: str, body: PairMessage) -> None:
        self._command(partial(self._send_to, instance, body))

    def recv(self) -> list[PairEvent]:
        if self._broken is not None:
            raise self._broken
        with suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        found: list[PairEvent] = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def fileno(self) -> int:
        return self._event_fd

    def close(self) -> None:
        """Close all connections; peers see it as the end of this instance. May be called twice."""
        if self._event_fd < 0:
            return
        self._stopping = True
        self._wakeup.set()
        self._thread.join()
        self._finder.close()
        self._wakeup.close()
        os.close(self._event_fd)
        self._event_fd = -1

    def _command(self, do: Callable[[int], None]) -> None:
        self._commands.append(do)
        self._wakeup.set()

    # ---- the link's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that receives, which raises it
            self._broken = error
            os.eventfd_write(self._event_fd, 1)
        self._wire.close()

    def _turn(self) -> None:
        for event in self._wire.turn(self._timeout_s(), monotonic_ns):
            match event:
                case Came():
                    self._came(event.connection, event.frame, monotonic_ns())
                case Broke():
                    self._broke(event.connection, event.why, monotonic_ns(), refused=event.refused)
        now_ns = monotonic_ns()
        while self._commands:
            self._commands.popleft()(now_ns)
        self._tend(now_ns)

    def _timeout_s(self) -> float | None:
        busy = self._wire.connections or self._peers.known or any(self._search.active())
        return BEAT_NS / NS_PER_S if busy else None

    def _emit(self, event: PairEvent) -> None:
        self._events.append(event)
        os.eventfd_write(self._event_fd, 1)

    def _lost(self, event: Lost) -> None:
        """A peer is out of reach: also for requests that it looked for and has not asked for anything yet."""
        self._emit(event)
        card = self._peers.card(event.instance)
        if card is not None:
            for room in self._claims.left_by(event.instance):
                self._emit(Heard(card, Release(room, "The decode instance is out of reach.")))

    def _tend(self, now_ns: int) -> None:
        """What time asks for: beats, silences, greetings that take too long, rooms to be found."""
        stalled_ns, self._turned_ns = now_ns - self._turned_ns - BEAT_NS, now_ns
        if self._wire.connections and stalled_ns > BEAT_NS:
            self._peers.stalled(stalled_ns)  # it was us who did not listen
        for connection in list(self._wire.connections):
            if connection.stage is Stage.UP:
                if now_ns - connection.sent_ns >= BEAT_NS:
                    self._send(connection, frames.Beat(), now_ns)
            elif now_ns - connection.began_ns > (ASK_NS if connection in self._asks else GREETING_NS):
                self._wire.drop(connection)
                self._broke(connection, "it did not answer in time", now_ns)
        self._peers.listen(now_ns)
        for peer in self._peers.to_ask(now_ns):
            self._ask(peer.address, partial(self._fate, peer.card.instance), now_ns)
        self._seek(now_ns)

    # ---- connections

    def _send(self, connection: Connection, frame: Frame, now_ns: int) -> None:
        if connection not in self._wire.connections:
            return
        try:
            connection.send(frame, now_ns)
        except PeerError as error:
            self._wire.drop(connection)
            self._broke(connection, str(error), now_ns)

    def _send_to(self, instance: str, body: PairMessage, now_ns: int) -> None:
        connection = self._peers.connection(instance)
        if connection is not None:
            self._send(connection, body, now_ns)

    def _came(self, connection: Connection, frame: Frame | None, now_ns: int) -> None:
        if connection.stage in (Stage.LEAVING, Stage.CLOSED):
            return
        match frame:
            case None:
                self._connected(connection, now_ns)
            case frames.Ask():
                self._leave(connection, frames.Alive(self._card.instance), now_ns)
            case frames.Alive(instance) if connection in self._asks:
                self._wire.drop(connection)
                self._asks.pop(connection)(Answer(instance))
            case frames.Hello() if connection.hello is None:
                self._greeted(connection, frame, now_ns)
            case frames.Rejected(error) if connection.dialled:
                self._rejected(connection, error, now_ns)
            case frames.Proof() if connection.hello is not None and connection.stage is Stage.GREETING:
                self._proved(connection, connection.hello, frame, now_ns)
            case _ if connection.stage is Stage.UP:
                self._heard(connection, frame, now_ns)
            case _:
                self._wire.drop(connection)
                self._broke(connection, f"it said {type(frame).__name__} out of turn", now_ns)

    def _heard(self, connection: Connection, frame: Frame, now_ns: int) -> None:
        self._peers.heard(connection)
        match frame:
            case frames.Beat():
                pass
            case frames.Where(room):
                if self._claims.seek(room, connection.instance, now_ns):
                    self._send(connection, frames.Here(room), now_ns)
                    self._claims.told(room, connection.instance, now_ns)
            case frames.Here(room):
                self._search.end(room)  # also when it was given up: the other side must hear that nobody wants it
                if connection.hello is not None:
                    self._emit(Linked(room, connection.hello.card))
            case frames.Hello() | frames.Proof() | frames.Rejected() | frames.Ask() | frames.Alive():
                _log.warning("Instance %s said %s again.", connection.instance[:8], type(frame).__name__)
            case _ if connection.hello is not None:
                self._claims.met(frame.room)
                self._emit(Heard(connection.hello.card, frame))

    def _broke(self, connection: Connection, why: str, now_ns: int, *, refused: bool = False, text: str = "") -> None:
        """A connection has ended, or could not be made. text: what to say of its address."""
        self._asked.pop(connection, None)
        answer = self._asks.pop(connection, None)
        if answer is not None:
            answer(Answer("", why, refused, connection.reached))
        elif connection.dialled and self._dialled.get(connection.dialled) is connection:
            del self._dialled[connection.dialled]
            host, port = connection.dialled
            text = text or f"The prefill instance at {host}:{port} cannot be reached: {why}."
            self._search.refused(connection.dialled, text, now_ns)
        if self._peers.broke(connection, now_ns):
            _log.warning("The connection to instance %s is lost: %s", connection.instance[:8], why)

    def _leave(self, connection: Connection, last: Frame, now_ns: int) -> None:
        """Say one thing more, then close."""
        self._send(connection, last, now_ns)
        if connection in self._wire.connections:
            connection.stage = Stage.LEAVING

    # ---- greeting

    def _connected(self, connection: Connection, now_ns: int) -> None:
        if connection in self._asks:
            connection.stage = Stage.ASKING
            self._send(connection, frames.Ask(), now_ns)
        else:
            self._send(connection, self._own(connection), now_ns)

    def _own(self, connection: Connection) -> frames.Hello:
        """What this side says on `connection`, the same every time."""
        if connection.own is None:
            connection.own = frames.Hello(
                version=frames.VERSION,
                role=self._options.role,
                card=self._card,
                pid=os.getpid(),
                address=(self.address[0] or connection.sock.getsockname()[0], self.address[1]),
                sums=self._options.sums,
                nonce=secrets.token_bytes(_NONCE_BYTES),
            )
        return connection.own

    def _greeted(self, connection: Connection, theirs: frames.Hello, now_ns: int) -> None:
        connection.hello = theirs
        ours = self._own(connection)
        wrong = frames.mismatch(theirs, ours)
        if wrong:
            self._turn_away(connection, wrong, now_ns)
        elif connection.dialled is not None:
            self._send(connection, frames.prove(self._options.token, ours, theirs.nonce), now_ns)
        else:
            self._send(connection, ours, now_ns)

    def _proved(self, connection: Connection, theirs: frames.Hello, proof: frames.Proof, now_ns: int) -> None:
        if not frames.proved(proof, self._options.token, theirs, self._own(connection).nonce):
            self._turn_away(connection, f"The cluster tokens differ ({frames.TOKEN_VARIABLE}).", now_ns)
        elif connection.dialled is not None:
            self._join(connection, theirs, connection.dialled)
        else:
            self._ask(theirs.address, partial(self._checked, connection, theirs), now_ns)

    def _checked(self, connection: Connection, theirs: frames.Hello, answer: Answer) -> None:
        """Decode's advertised address has been tried: pages must be able to go there."""
        now_ns = monotonic_ns()
        if connection not in self._wire.connections:
            return
        if answer.instance != theirs.card.instance:
            host, port = theirs.address
            found = "another instance answers there" if answer.instance else answer.why
            text = f"It cannot reach this decode instance at the advertised address {host}:{port}: {found}. "
            self._turn_away(connection, text + "Start it with a --host that others can reach.", now_ns)
            return
        self._send(connection, frames.prove(self._options.token, self._own(connection), theirs.nonce), now_ns)
        self._join(connection, theirs, theirs.address)

    def _join(self, connection: Connection, theirs: frames.Hello, address: Address) -> None:
        """Both know who the other is."""
        if connection not in self._wire.connections:
            return
        connection.trust()
        before = self._peers.joined(connection, address)
        if before is not None:
            self._wire.drop(before)
        _log.info("Connected to %s instance %s.", theirs.role, theirs.card.instance[:8])

    def _turn_away(self, connection: Connection, error: str, now_ns: int) -> None:
        """The two sides do not fit: the one who dialled is to know why."""
        if connection.dialled is None:
            self._leave(connection, frames.Rejected(error), now_ns)
        else:
            self._rejected(connection, error, now_ns)

    def _rejected(self, connection: Connection, error: str, now_ns: int) -> None:
        """The two sides of a dialled connection do not fit: nothing that will pass by itself."""
        self._wire.drop(connection)
        assert connection.dialled is not None
        host, port = connection.dialled
        self._search.hopeless(connection.dialled)
        self._broke(connection, error, now_ns, text=f"The prefill instance at {host}:{port} does not fit. {error}")

    # ---- who is there

    def _ask(self, address: Address, on_answer: OnAnswer, now_ns: int) -> None:
        try:
            self._asks[self._wire.dial(address, now_ns)] = on_answer
        except OSError as error:
            on_answer(Answer("", error.strerror or str(error), isinstance(error, ConnectionRefusedError), False))

    def _fate(self, instance: str, answer: Answer) -> None:
        """The address of a lost peer has been tried."""
        now_ns = monotonic_ns()
        peer = self._peers.answered(instance, answer, now_ns)
        if peer is not None and self._options.role == "decode" and peer.address not in self._dialled:
            self._dial(peer.address, now_ns)

    # ---- rooms

    def _open(self, spec: PeerSpec, deadline_ns: int, now_ns: int) -> None:
        self._search.add(spec, deadline_ns, now_ns)
        for asked in self._asked.values():
            asked.discard(spec.room)  # the answer was about an earlier request of the same room

    def _claim(self, room: int, now_ns: int) -> None:
        seeker = self._claims.claim(room, now_ns)
        connection = self._peers.connection(seeker) if seeker is not None else None
        if connection is not None:
            self._send(connection, frames.Here(room), now_ns)
            self._claims.told(room, connection.instance, now_ns)

    def _found(self, site: Address, addresses: tuple[Address, ...] | str) -> None:
        """Called from the finder's threads."""
        self._command(partial(self._search.found, site, addresses))

    def _seek(self, now_ns: int) -> None:
        for where, site in self._search.active():
            if site.due(now_ns):
                site.looking, site.looked_ns = True, now_ns
                self._finder.look(where)
            connections = [self._dialled.get(address) or self._dial(address, now_ns) for address in site.addresses]
            standing = [connection for connection in connections if connection is not None]
            for connection in standing:
                self._ask_rooms(connection, site, now_ns)
            up = any(self._reach(connection.instance) for connection in standing)
            trying = any(connection.stage is not Stage.UP for connection in standing)
            site.judge(up=up, trying=trying, now_ns=now_ns)
        for room, text in self._search.given_up(now_ns):
            if self._search.end(room):
                self._emit(Unreachable(room, text))

    def _ask_rooms(self, connection: Connection, site: Site, now_ns: int) -> None:
        if connection.stage is Stage.UP:
            asked = self._asked.setdefault(connection, set())
            asked.intersection_update(site.opens)
            for room in [room for room in site.opens if room not in asked]:
                asked.add(room)
                self._send(connection, frames.Where(room), now_ns)

    def _dial(self, address: Address, now_ns: int) -> Connection | None:
        if not self._search.may_dial(address, now_ns):
            return None
        try:
            connection = self._dialled[address] = self._wire.dial(address, now_ns)
        except OSError as error:
            text = f"The prefill instance at {address[0]}:{address[1]} cannot be reached: {error.strerror}."
            self._search.refused(address, text, now_ns)
            return None
        return connection
