"""A lane carries messages one way between two endpoints; what its two ends share, whatever is in between.

An endpoint's owner thread writes and reads rings. Each end of a lane has a thread of its own that connects, greets, and
then sleeps until the other side is gone. A lane is one epoch: when it has ended, a new one begins from number 0.
"""

from __future__ import annotations

import select
import socket
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup, wait_ms
from moonlang.core.messages import Envelope
from moonlang.messaging.codec import Codec
from moonlang.messaging.sequence import Sequence
from moonlang.mooncake import greeting
from moonlang.mooncake.greeting import Accepted, Hello, Proof, Talk, Welcome
from moonlang.mooncake.ring import INLINE_BYTES, READER_SLEEPS, WRITER_WAITS, Geometry, Reader, Writer, fence

REDIAL_NS: Final = 10 * NS_PER_MS
_HANG_UP: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_JOIN_S: Final = 1.0

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an endpoint is. instance: drawn at its creation. token: what the whole cluster knows."""

    name: str
    instance: bytes
    token: str
    geometry: Geometry


class OutLane(ABC):
    """The sending end. Subclasses connect, and know how the reader is woken.

    patient: messages may be stored before the peer is there. ready: messages are taken. up: the reader has the ring.
    ended: why nothing can be sent any more, "" while it can. seq: of the next message.
    """

    def __init__(self, identity: Identity, to: str, writer: Writer, *, patient: bool) -> None:
        self.to = to
        self.writer = writer
        self.seq = 0
        self.ready = patient
        self.instance = b""  # of the peer
        self.up = threading.Event()
        self.ended = ""
        self._identity = identity
        self._room = Wakeup()  # rung when the reader, for whom this side waits, has made room
        self._stop = Wakeup()
        self._poll = select.poll()
        self._poll.register(self._room.fileno(), select.POLLIN)
        self._thread = threading.Thread(target=self._live, name=f"to-{to}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, message: bytearray, timeout_ns: int) -> None:
        """Store one message and wake the reader. PeerError when it makes no room within the time, or is gone."""
        if len(message) <= INLINE_BYTES and self.writer.put(message):
            self.publish()
            return
        pieces = self.writer.put_large(message)
        deadline_ns = monotonic_ns() + timeout_ns
        for stored in pieces:
            self.publish()
            if stored:
                deadline_ns = monotonic_ns() + timeout_ns
            else:
                self._wait_room(deadline_ns, timeout_ns)

    @abstractmethod
    def publish(self) -> None:
        """Let the reader know what has been stored."""

    @property
    def unread(self) -> bool:
        """Not all that was stored has been read."""
        return self.writer.unread

    def close(self, linger_ns: int) -> None:
        """Let the reader get hold of what was stored, then let go of it."""
        if self.unread and not self.ended:
            self.up.wait(linger_ns / NS_PER_S)
        self._stop.set()
        self._thread.join(_JOIN_S)
        self._room.close()
        self._stop.close()

    def _is_up(self) -> None:
        self.ready = True
        self.up.set()

    @abstractmethod
    def _connect(self) -> None:
        """Meet the peer, serve the lane until it ends. PeerError says why it did."""

    def _live(self) -> None:
        try:
            self._connect()
            self.ended = "It is closed."
        except PeerError as error:
            self.ended = error.message
        self.ready = False
        self.up.set()  # nobody has to wait for it any more
        self._room.set()

    def _wait_room(self, deadline_ns: int, timeout_ns: int) -> None:
        if self.ended:
            raise PeerError(f"{self.to!r} is gone: {self.ended}")
        left_ns = deadline_ns - monotonic_ns()
        if left_ns <= 0:
            raise PeerError(f"The inbox of {self.to!r} stays full: nothing was taken for {timeout_ns // NS_PER_MS} ms.")
        if self.writer.words[WRITER_WAITS]:
            self._poll.poll(wait_ms(left_ns))
        self._room.clear()
        self.writer.words[WRITER_WAITS] = 1
        fence()

    def _greet(self, sock: socket.socket, stream: bytes, fds: tuple[int, ...]) -> tuple[Accepted, list[int]]:
        """The dialler's side of a greeting: what the acceptor said, and the descriptors that came along."""
        identity = self._identity
        hello = Hello(
            version=greeting.VERSION,
            source=identity.name,
            to=self.to,
            instance=identity.instance,
            stream=stream,
            nonce=greeting.new_nonce(),
            ring_bytes=identity.geometry.ring_bytes,
            arena_bytes=identity.geometry.arena_bytes,
        )
        talk = Talk(sock)
        try:
            talk.say(hello)
            welcome = talk.hear(Welcome)
            if not greeting.same(welcome.mac, greeting.proof(identity.token, "acceptor", hello, welcome.nonce)):
                raise PeerError(f"{self.to!r} does not know the cluster's token.")
            talk.say(Proof(greeting.proof(identity.token, "dialler", hello, welcome.nonce)), fds)
            accepted = talk.hear(Accepted)
        except BaseException:
            talk.close_fds()
            raise
        self.instance = welcome.instance
        return accepted, talk.fds


class InLane(ABC):
    """The receiving end. Its owner calls `read`; its thread sees the sender go."""

    def __init__(self, name: str, hello: Hello, reader: Reader, codec: Codec, sock: socket.socket) -> None:
        self.source = hello.source
        self.stream = hello.stream
        self.reader = reader
        self.ended = False
        self.replaced = False  # by a new lane of the same source
        self._name = name
        self._sock = sock
        self._codec = codec
        self._sequence = Sequence()
        self._found: list[Envelope] = []

    def read(self, most: int, found: list[Envelope]) -> None:
        """Append up to `most` messages to `found`. RingError: the lane is of no use any more."""
        self._found = found
        before = self.reader.position
        self.reader.read(most, self._deliver)
        if self.reader.position != before:
            self.credit()

    def has_more(self) -> bool:
        """Something is there, or is about to be."""
        return self.reader.has_more()

    @abstractmethod
    def credit(self) -> None:
        """Tell a sender that waits how far the reader has come."""

    def woken(self) -> bool:
        """Has the sender rung since `rest`?"""
        return not self.reader.words[READER_SLEEPS]

    def rest(self) -> None:
        """From now on the sender must ring; a `fence` has to follow, and a look whether there is more."""
        self.reader.words[READER_SLEEPS] = 1

    @property
    def is_landing(self) -> bool:
        """Something is about to arrive, and nothing will tell when it has."""
        return False

    def may_end(self, sock: socket.socket) -> bool:
        """The connection is gone; False when another one goes on with the lane. May wait for one."""
        return True

    def hang_up(self) -> None:
        """Wake the thread, which then closes the connection. May be called at any time."""
        with suppress(OSError):  # it is closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    @abstractmethod
    def accept(self, talk: Talk) -> None:
        """The last word of the greeting."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory."""

    def _deliver(self, frame: memoryview | bytearray) -> bool:
        try:
            envelope = self._codec.decode(frame)
        except PeerError as error:
            _log.error("A message from %s is dropped. %s", self.source, error)
            return False
        if envelope.source != self.source or envelope.to != self._name:
            _log.error("A message from %s claims to go from %s to %s.", self.source, envelope.source, envelope.to)
            return False
        if not self._sequence.admit(envelope):
            return False
        self._found.append(envelope)
        return True


def wait_hang_up(sock: socket.socket, stop: Wakeup | None = None) -> bool:
    """Sleep until `sock` is closed by the other side or shut down by this one (True), or `stop` is set."""
    poll = select.poll()
    poll.register(sock, _HANG_UP)
    if stop is not None:
        poll.register(stop.fileno(), select.POLLIN)
    return any(fd == sock.fileno() for fd, _ in poll.poll())
