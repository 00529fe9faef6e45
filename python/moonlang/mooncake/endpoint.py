"""Messages between processes without a broker, a copy through the kernel or a core polled away.

Every pair of endpoints that talk has a lane in each direction: a ring in shared memory on one host (`neighbour`), one
that Mooncake's transfer engine writes into between hosts (`remote_out`, `remote_in`). A reader that has nothing to do
sleeps in poll(2) on a bell; a writer rings only when the reader has said that it sleeps.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from os import EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, eventfd_read, eventfd_write
from typing import Final

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import wait_ms
from moonlang.core.messages import Envelope, Message
from moonlang.messaging.codec import Codec
from moonlang.mooncake import address as addresses_of
from moonlang.mooncake import config, greeting, probe
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.greeting import Hello, Proof, Rejected, Talk, Welcome
from moonlang.mooncake.lane import Identity, InLane, OutLane, wait_hang_up
from moonlang.mooncake.listener import Listener
from moonlang.mooncake.neighbour import NeighbourIn, NeighbourOut
from moonlang.mooncake.patience import LOOK_NS, STAY_NS, Patience
from moonlang.mooncake.remote_in import RemoteIn
from moonlang.mooncake.remote_out import RemoteOut
from moonlang.mooncake.ring import DEFAULT_GEOMETRY, Geometry, RingError, fence
from moonlang.mooncake.site import Site

NewEngine = Callable[[str], Engine]

SEND_TIMEOUT_NS: Final = 1000 * NS_PER_MS
LINGER_NS: Final = 200 * NS_PER_MS  # how long `close` waits for a peer that is not there yet
_KEPT_FRAME_BYTES: Final = 4 << 20  # what the buffer for encoding may keep

_log = log.get(__name__)


def new_engine(host: str) -> Engine:
    """A transfer engine as the environment describes it, that listens on `host`."""
    found = config.read(os.environ, probe.hardware(), host=probe.reachable(host), ib_device=None, force_tcp=False)
    return Engine(found)


class MooncakeEndpoint:
    """An Endpoint over rings. Owned by one thread at a time."""

    def __init__(
        self,
        name: str,
        addresses: dict[str, str],
        *,
        token: str = "",
        geometry: Geometry = DEFAULT_GEOMETRY,
        send_timeout_ns: int = SEND_TIMEOUT_NS,
        new_engine: NewEngine = new_engine,
    ) -> None:
        """ConfigError when the mailbox cannot be opened where `addresses` says.

        new_engine: makes the transfer engine, given the host that others reach; called when a peer is on another one.
        """
        geometry.check()
        self.name = name
        self._addresses = addresses
        self._identity = Identity(name, secrets.token_bytes(16), token, geometry)
        self._send_timeout_ns = send_timeout_ns
        self._codec = Codec()
        self._frame = bytearray()
        self._out: dict[str, OutLane] = {}
        self._in: tuple[InLane, ...] = ()
        self._lock = threading.Lock()  # of _in and _closed
        self._closing = False
        self._closed = False
        self._bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        self._rung = False  # by this endpoint itself
        self._heard = False  # by `wait`, and not taken back yet
        self._resting = False  # senders have to ring
        self._watched = False  # somebody waits for `fileno`: senders have to ring whenever `recv` is done
        self._patience = Patience()
        self._polls: dict[tuple[int, ...], select.poll] = {}
        self._new_engine = new_engine
        self._site: Site | None = None
        own = addresses_of.parse(addresses[name])
        self._host = next((where.host for where in own if not where.path), "")
        self._epoll = select.epoll()  # of the bell, and of the connections with other hosts
        self._epoll.register(self._bell, select.EPOLLIN)
        self._fd = self._epoll.fileno() if self._host else self._bell
        self._listeners = [Listener(where, self._serve) for where in own]

    def send(self, to: str, body: Message) -> None:
        """Queue one message. PeerError when the peer does not make room within the send timeout, is gone or unknown."""
        lane = self._out.get(to)
        if lane is None or not lane.ready:
            lane = self._lane(to, lane)
        frame = self._frame
        self._codec.encode_into(Envelope(to, self.name, lane.seq, body), frame)
        try:
            lane.put(frame, self._send_timeout_ns)
        except RingError as error:
            lane.ready, lane.ended = False, error.message
            raise
        lane.seq += 1
        if len(frame) > _KEPT_FRAME_BYTES:
            self._frame = bytearray()

    def recv(self, most: int = 256) -> list[Envelope]:
        """Up to `most` messages that have arrived, fewer when they are large; never blocks."""
        found: list[Envelope] = []
        while True:
            left = False
            for lane in self._in:
                ended = lane.ended
                try:
                    lane.read(most - len(found), found)
                except RingError as error:
                    _log.error("The connection with %s is given up. %s", lane.source, error)
                    self._drop(lane)
                    continue
                left = left or lane.reader.left
                if ended and not lane.has_more():
                    self._drop(lane)
            if not self._watched:
                return found
            if left or len(found) >= most:
                self._ring()
                return found
            if self._rest(bool(found)):
                return found

    def wait(self, timeout_ns: int, *, also: Seq[int] = ()) -> None:
        """Block until a message is there, a descriptor in `also` is readable, or the time is up (whole ms)."""
        if self._has_more():
            return
        poll = self._polls.get(key := tuple(also)) or self._new_poll(key)
        if self._watched:  # the bell is not for this call alone: it stays as it is
            poll.poll(wait_ms(timeout_ns))
            return
        if self._heard:
            self._hush()
        patience = self._patience
        if patience.begin(monotonic_ns()) and timeout_ns > STAY_NS and self._stay_awake(poll):
            return
        if self._rest(True):
            message = self._hears(poll.poll(wait_ms(timeout_ns)))
            patience.asleep(monotonic_ns(), message)

    def fileno(self) -> int:
        """Readable when a message may have come."""
        if not self._watched:
            self._watched = True
            if not self._rest(False):
                self._ring()
        return self._fd

    def close(self) -> None:
        """Let the last messages leave (briefly), then free the memory. May be called twice."""
        if self._closing:
            return
        self._closing = True
        for lane in self._out.values():
            lane.close(LINGER_NS)
        for listener in self._listeners:
            listener.close()
        for lane in self._in:
            self._drop(lane)
        with self._lock:
            self._closed = True
            self._epoll.close()
            close(self._bell)
        if self._site is not None:
            self._site.close()

    def _rest(self, found: bool) -> bool:
        """Go to rest: from now on senders must ring. False when one has stored something in the meantime."""
        if self._rung or not found or (self._resting and any(lane.woken() for lane in self._in)):
            self._hush()
        self._resting = True
        lanes = self._in
        for lane in lanes:
            lane.rest()
        fence()
        if any(lane.is_landing for lane in lanes):
            self._ring()  # come back soon
            return True
        return not self._has_more()

    def _hush(self) -> None:
        """Take a ring of the bell back."""
        self._rung = self._heard = False
        with suppress(BlockingIOError):
            eventfd_read(self._bell)

    def _has_more(self) -> bool:
        """`recv` has something to do."""
        for lane in self._in:  # noqa: SIM110 - a generator takes twice the time
            if lane.has_more() or lane.ended:
                return True
        return False

    def _stay_awake(self, poll: select.poll) -> bool:
        """Look for a message, and for whatever else ends a wait, for a moment; False: nothing has come."""
        patience = self._patience
        begun_ns = now_ns = monotonic_ns()
        while now_ns - begun_ns < STAY_NS:
            if self._has_more():
                patience.awake(now_ns)
                return True
            if ready := poll.poll(0):
                if self._hears(ready):
                    patience.awake(now_ns)
                else:
                    patience.in_vain(now_ns)
                return True
            before_ns, now_ns = now_ns, monotonic_ns()
            if now_ns - before_ns > LOOK_NS:
                break
        patience.in_vain(now_ns)
        return False

    def _new_poll(self, also: tuple[int, ...]) -> select.poll:
        poll = self._polls[also] = select.poll()
        for fd in (self._fd, *also):
            poll.register(fd, select.POLLIN)
        return poll

    def _hears(self, ready: list[tuple[int, int]]) -> bool:
        """Has a message ended a wait, or something else?"""
        heard = any(fd == self._fd for fd, _ in ready)
        self._heard = self._heard or heard
        return heard

    def _ring(self) -> None:
        """Keep the descriptor readable."""
        if not self._rung:
            self._rung = True
            eventfd_write(self._bell, 1)

    def _lane(self, to: str, before: OutLane | None) -> OutLane:
        """The first lane to a peer takes messages before the peer is there; a later one only once it is back, and
        until then this is a PeerError."""
        if to not in self._addresses:
            raise PeerError(f"{self.name!r} knows no peer {to!r}.")
        if before is not None and not before.ended:
            raise PeerError(f"{to!r} is gone and has not come back.")
        lane = self._out[to] = self._new_lane(to, patient=before is None)
        if before is None:
            return lane
        lost = " Some messages were not read." if before.unread else ""
        before.close(0)
        raise PeerError(f"{to!r} is gone.{lost} {before.ended}")

    def _new_lane(self, to: str, *, patient: bool) -> OutLane:
        where = addresses_of.nearest(addresses_of.parse(self._addresses[to]))
        if where.path:
            return NeighbourOut(self._identity, to, where.path, patient=patient)
        return RemoteOut(self._identity, to, (where.host, where.port), self._own_site(), patient=patient)

    def _own_site(self) -> Site:
        with self._lock:
            if self._site is None:
                self._site = Site(self._new_engine(self._host))
            return self._site

    def _drop(self, lane: InLane) -> None:
        """Hang up, and let go of the memory."""
        lane.hang_up()
        with self._lock:
            self._in = tuple(other for other in self._in if other is not lane)
        lane.close()

    def _serve(self, sock: socket.socket) -> None:
        """A connection, from its greeting to its end; in a thread of its own."""
        talk = Talk(sock)
        try:
            lane = self._welcome(talk)
        except PeerError as error:
            _log.error("%s refuses a connection. %s", self.name, error)
            with suppress(PeerError):
                talk.say(Rejected(error.message))
            return
        finally:
            talk.close_fds()
        try:
            lane.accept(talk)
            wait_hang_up(sock)
        except PeerError as error:
            _log.error("%s loses a connection. %s", self.name, error)
        if lane.may_end(sock):
            lane.ended = True
            self._wake()

    def _welcome(self, talk: Talk) -> InLane:
        """The lane of a connection whose sender has proved who it is: a new one, or one that is resumed."""
        hello = self._greet(talk)
        if talk.sock.family == socket.AF_UNIX:
            lane = NeighbourIn(self._identity, hello, self._codec, talk, self._bell)
        else:
            for known in self._in:
                if isinstance(known, RemoteIn) and (known.source, known.stream) == (hello.source, hello.stream):
                    known.resume(talk.sock)
                    return known
            lane = RemoteIn(self._identity, hello, self._codec, talk, self._own_site(), self._epoll)
        self._add(lane)
        return lane

    def _greet(self, talk: Talk) -> Hello:
        """The acceptor's side of a greeting, but for the last word. PeerError when the peer is not welcome."""
        hello = talk.hear(Hello)
        identity = self._identity
        if (hello.version, hello.to) != (greeting.VERSION, self.name):
            raise PeerError(f"This is {self.name!r} with version {greeting.VERSION} of the protocol.")
        if hello.source not in self._addresses:
            raise PeerError(f"{hello.source!r} is no peer of {self.name!r}.")
        if Geometry(hello.ring_bytes, hello.arena_bytes) != identity.geometry:
            raise PeerError(f"The rings of {self.name!r} have another size.")
        nonce = greeting.new_nonce()
        mac = greeting.proof(identity.token, "acceptor", hello, nonce)
        talk.say(Welcome(identity.instance, nonce, mac))
        if not greeting.same(talk.hear(Proof).mac, greeting.proof(identity.token, "dialler", hello, nonce)):
            raise PeerError(f"{hello.source!r} does not know the cluster's token.")
        return hello

    def _add(self, lane: InLane) -> None:
        with self._lock:
            if self._closed:
                lane.hang_up()
                return
            for other in self._in:
                if other.source == lane.source:
                    other.replaced = True
                    other.hang_up()
            self._in = (*self._in, lane)
        self._wake()

    def _wake(self) -> None:
        """The owner's thread, from another one."""
        with self._lock:
            if not self._closed:
                self._ring()


def open_mailbox(name: str, addresses: dict[str, str], token: str) -> MooncakeEndpoint:
    """The endpoint of --messaging-backend mooncake."""
    return MooncakeEndpoint(name, addresses, token=token)
