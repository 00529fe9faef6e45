"""Lanes between hosts: Mooncake's transfer engine writes the sender's ring into the receiver's.

The sender keeps a copy of the whole ring: what was stored goes out as one contiguous write per batch (two where the
ring wraps), ended by a word that is different for every batch. A TCP connection beside it carries a bell per batch
(how far the ring is valid, and the checksum of the batch), and the receiver's credits back. The bell is sent while the
write is under way, so that the reader wakes up meanwhile; it believes what lies in its memory only when the last
word is there and the checksum fits. Bodies in the arena are written before the batch that refers to them.

Nobody who can merely reach the transfer engine's port can make up a message: positions and checksums come over the
connection that was greeted with the cluster's token, and checksums begin from a secret number.

A connection that breaks while both processes live is resumed: the receiver says how far it has come, the sender writes
the rest again to where it was written before, which changes nothing if it had arrived.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import mmap
import os
import secrets
import select
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import xxhash

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import PeerError
from moonlang.base.process_memory import TAG_BYTES
from moonlang.base.wakeup import Wakeup
from moonlang.core.messages import Envelope
from moonlang.messaging.codec import MAX_BYTES, Codec
from moonlang.mooncake.engine import Engine, Peer
from moonlang.mooncake.greeting import Accepted, Hello, Talk
from moonlang.mooncake.lane import REDIAL_NS, Identity, InLane, OutLane
from moonlang.mooncake.ring import (
    CONSUMED,
    HEADER_BYTES,
    PRODUCED,
    RELEASED,
    WRITER_WAITS,
    Block,
    RingError,
    LandingError,
    Reader,
    Writer,
)
from moonlang.mooncake.wheel import DONE, PENDING

RESUME_NS: Final = 5 * NS_PER_S  # for so long a receiver keeps what it has of a lane whose connection broke
LANDING_NS: Final = 2 * NS_PER_S  # a write that was rung for and is not there by then is lost
OVERTAKEN_NS: Final = 60_000  # so long a reader stays awake for a write that was rung for
MAX_FLIGHTS: Final = 8  # writes of one lane under way; what is stored meanwhile makes the next batch
UNACKNOWLEDGED_MS: Final = 800  # bytes that the peer's host does not take for so long end the connection
MAX_TRIES: Final = 2  # of one write
CONNECT_S: Final = 1.0
LEAVE_NS: Final = 200 * NS_PER_MS  # how long a lane that is closed waits for its last writes
_QUIET_LOOKS: Final = 20  # of which none found anything to do; then the thread sleeps until it is poked
_LOOK_MS: Final = 1  # how often the lane's thread asks after writes under way
_RESUME_LOOK_S: Final = 0.02
_LANDING_NAP_S: Final = 20e-6
_READ_BYTES: Final = 1 << 14
_BELL = struct.Struct("<QQ")  # position behind the batch, its checksum
_GOODBYE: Final = _BELL.pack(0, 0)
_CREDIT = struct.Struct("<QQ")  # positions behind what was read, of ring and arena

_log = log.get(__name__)


class RegisteredMemory:
    """Zeroed memory that the transfer engine may write into, or read from."""

    def __init__(self, engine: Engine, size: int) -> None:
        mapping = mmap.mmap(-1, size)
        self.view = memoryview(mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        engine.register(self.address, size)


def prepare(sock: socket.socket) -> None:
    """Small messages leave at once; a peer whose host is gone is noticed within a second of the next bell."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        sock.setsockopt(socket.IPPROTO_TCP, option, 1)


@dataclass(slots=True)
class _Flight:
    """A write under way."""

    handle: int
    offset: int
    size: int
    tries: int = 1


class Site:
    """The transfer engine of an endpoint, and where peers can see that it is the one that was meant."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tag = secrets.token_bytes(TAG_BYTES)
        self._memory = ctypes.create_string_buffer(self.tag, TAG_BYTES)
        self._tag_address = ctypes.addressof(self._memory)
        engine.register(self._tag_address, TAG_BYTES)
        self.session = engine.session(self._tag_address)
        self._free: list[RegisteredMemory] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> RegisteredMemory:
        """Memory of that size. What was in use before is used again: late writes of a peer that was given up may
        still hit it, and must hit memory; the new user's checksums tell."""
        with self._lock:
            for memory in self._free:
                if len(memory.view) == size:
                    self._free.remove(memory)
                    memory.view[:HEADER_BYTES] = bytes(HEADER_BYTES)
                    return memory
        return RegisteredMemory(self.engine, size)

    def give_back(self, memory: RegisteredMemory) -> None:
        with self._lock:
            self._free.append(memory)

    def close(self) -> None:
        """All memory has been given back."""
        for memory in self._free:
            self.engine.unregister(memory.address)
        self.engine.unregister(self._tag_address)
        self.engine.close()


class RemoteOut(OutLane):
    """The sending end. The owner's thread stores and sends, the lane's thread takes credits and looks after the rest."""

    def __init__(
        self, identity: Identity, to: str, address: tuple[str, int], site: Site, *, patient: bool
    ) -> None:
        self._stream = secrets.token_bytes(16)
        geometry = identity.geometry
        self._memory = site.take(geometry.total_bytes)
        sums = checksum(identity.token, self._stream)
        super().__init__(identity, to, Writer(self._memory.view[:], geometry, sums.of), patient=patient)
        self._sums = sums
        self._site = site
        self._engine = site.engine
        self._address = address
        self._ring_bytes = geometry.ring_bytes
        self._lock = threading.Lock()  # of all below, and of sending
        self._sock: socket.socket | None = None  # while connected
        self._peer: Peer | None = None
        self._target = 0  # address of the ring at the peer
        self._sent = 0  # position behind what was rung for
        self._blocks: deque[Block] = deque()  # sent, but not read yet
        self._flights: list[_Flight] = []
        self._poke = Wakeup()  # the lane's thread has something to look after
        self.start()

    def publish(self) -> None:
        with self._lock:
            self._send()
            if not self._poke.is_set:
                self._poke.set()

    def close(self, linger_ns: int) -> None:
        super().close(linger_ns)
        self.writer.release()
        self._site.give_back(self._memory)
        self._poke.close()

    def _send(self) -> None:
        """Hand to the engine what was stored, unless enough is under way; then ring."""
        sock, end = self._sock, self.writer.position
        if sock is None:
            return
        if self._flights:
            self._land()
        if end == self._sent or len(self._flights) >= MAX_FLIGHTS:
            return
        for block in self.writer.blocks:
            self._take_off(block.offset, block.size)
        self._blocks += self.writer.blocks
        self.writer.blocks.clear()
        parts = _parts(self._sent, end, self._ring_bytes)
        for offset, size in parts:
            self._take_off(offset, size)
        try:
            sent = sock.send(_BELL.pack(end, self._sums.of_parts(self._memory.view, parts)))
        except BlockingIOError:
            return  # the lane's thread will try again, and write again what is there already
        except OSError:
            self._break()
            return
        if sent != _BELL.size:
            self._break()
        self._sent = end

    def _take_off(self, offset: int, size: int, tries: int = 1) -> None:
        if self._peer is None:
            return
        here, there = self._memory.address + offset, self._target + offset
        try:
            self._flights.append(_Flight(self._engine.submit(self._peer, here, there, size), offset, size, tries))
        except PeerError as error:
            _log.error("A message to %s has to be sent again: %s", self.to, error.message)
            self._break()

    def _land(self) -> None:
        """Ask each write once. One that failed is tried again; the second failure breaks the connection."""
        flying, self._flights = self._flights, []
        for flight in flying:
            status = self._engine.status(flight.handle)
            if status == PENDING:
                self._flights.append(flight)
            elif status != DONE and flight.tries < MAX_TRIES:
                self._take_off(flight.offset, flight.size, flight.tries + 1)
            elif status != DONE:
                self._break()

    def _break(self) -> None:
        """The lane's thread begins anew."""
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> None:
        instance = b""
        deadline_ns = 1 << 62
        while True:
            sock = self._dial(deadline_ns)
            if sock is None:
                return
            with sock:
                instance = self._meet(sock, instance)
                self._is_up()
                lost = self._serve(sock)
                self.ready = False
                with self._lock:
                    self._sock = None
                if not lost:
                    return
            _log.warning("The connection to %s broke; it is resumed when the peer answers.", self.to)
            deadline_ns = monotonic_ns() + RESUME_NS

    def _dial(self, deadline_ns: int) -> socket.socket | None:
        """Connect as soon as the peer is there; None when this end is closed before. PeerError: not in time."""
        while not self._stop.wait(0):
            try:
                return socket.create_connection(self._address, timeout=CONNECT_S)
            except OSError as error:
                if monotonic_ns() > deadline_ns:
                    raise PeerError(f"It is out of reach: {error}.") from error
            self._stop.wait(REDIAL_NS)
        return None

    def _meet(self, sock: socket.socket, instance: bytes) -> bytes:
        """Greet, and set up what is written where; instance: whom it must be, b"" for anyone."""
        prepare(sock)
        accepted, found = self._greet(sock, self._stream, ())[0], self.instance
        if instance not in (b"", found):
            raise PeerError("It has been restarted.")
        peer = Peer(accepted.session, accepted.tag)
        self._engine.reach(peer)
        sock.setblocking(False)
        with self._lock:
            self._credit(accepted.consumed, accepted.released)
            if not accepted.consumed <= accepted.produced <= self.writer.position:
                raise RingError(f"The peer claims to have {accepted.produced} bytes of {self.writer.position}.")
            self._peer, self._target, self._sock = peer, accepted.address, sock
            self._sent = accepted.produced
            self._flights = []
            for block in self._blocks:
                self._take_off(block.offset, block.size)
            self._send()
        return found

    def _serve(self, sock: socket.socket) -> bool:
        """Take credits and look after writes under way, until the connection breaks (True) or this end is closed."""
        poll = select.poll()
        for fd in (sock.fileno(), self._stop.fileno(), self._poke.fileno()):
            poll.register(fd, select.POLLIN)
        unread = bytearray()
        quiet_looks, leave_ns = _QUIET_LOOKS, 0
        while True:
            ready = [fd for fd, _ in poll.poll(_LOOK_MS if quiet_looks < _QUIET_LOOKS else None)]
            if sock.fileno() in ready and not self._take_credits(sock, unread):
                return True
            if self._stop.fileno() in ready:
                poll.unregister(self._stop.fileno())
                leave_ns = monotonic_ns() + LEAVE_NS
            with self._lock:
                self._send()
                poked = self._poke.fileno() in ready
                quiet_looks = quiet_looks + 1 if self._gone_out() and not poked else 0
                if leave_ns and (quiet_looks or monotonic_ns() > leave_ns):
                    with suppress(OSError):
                        sock.send(_GOODBYE)
                    return False
                if quiet_looks == _QUIET_LOOKS:
                    self._poke.clear()
                    poll.register(self._poke.fileno(), select.POLLIN)
                elif poked:
                    poll.unregister(self._poke.fileno())  # it stays set while somebody looks

    def _gone_out(self) -> bool:
        return not self._flights and self._sent == self.writer.position

    def _take_credits(self, sock: socket.socket, unread: bytearray) -> bool:
        """False when the connection is broken."""
        try:
            chunk = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        unread += chunk
        whole = len(unread) // _CREDIT.size * _CREDIT.size
        if whole:
            with self._lock:
                self._credit(*_CREDIT.unpack_from(unread, whole - _CREDIT.size))
            del unread[:whole]
        return bool(chunk)

    def _credit(self, consumed: int, released: int) -> None:
        """The peer has read so far. RingError: it cannot have."""
        words = self.writer.words
        if not words[CONSUMED] <= consumed <= self.writer.position or released < words[RELEASED]:
            raise RingError(f"{self.to!r} claims to have read {consumed} bytes of {self.writer.position}.")
        words[CONSUMED], words[RELEASED] = consumed, released
        while self._blocks and self._blocks[0].position < consumed:
            self._blocks.popleft()
        if words[WRITER_WAITS]:
            words[WRITER_WAITS] = 0
            self._room.set()


class RemoteIn(InLane):
    """The receiving end. Its memory stays when the connection breaks, for the sender to go on."""

    def __init__(self, identity: Identity, hello: Hello, codec: Codec, talk: Talk, site: Site, epoll: select.epoll) -> None:
        """epoll: wakes the owner; the connection is in it while it can be read."""
        geometry = identity.geometry
        self._memory = site.take(geometry.total_bytes)
        self._sums = checksum(identity.token, hello.stream)
        reader = Reader(self._memory.view[:], geometry, MAX_BYTES, self._sums.of)
        super().__init__(identity.name, hello, reader, codec, talk.sock)
        self._site = site
        self._epoll = epoll
        self._lock = threading.Lock()  # of reading, against `resume`
        self._ring_bytes = geometry.ring_bytes
        self._arena_bytes = geometry.arena_bytes
        self._produced = 0  # position behind what has been found to be there
        self._unread = bytearray()
        self._bells: deque[tuple[int, int]] = deque()
        self._late_ns = 0  # since when the next batch, or the next body, is waited for
        self._credited = (0, 0)
        self.finished = False  # the sender has said good-bye

    def accept(self, talk: Talk) -> None:
        prepare(talk.sock)
        talk.say(
            Accepted(
                session=self._site.session,
                address=self._memory.address,
                tag=self._site.tag,
                produced=self._produced,
                consumed=self.reader.position,
                released=self.reader.released,
            )
        )
        talk.sock.setblocking(False)
        self._epoll.register(talk.sock, select.EPOLLIN)

    def resume(self, sock: socket.socket) -> None:
        """A new connection in place of the one that broke."""
        with self._lock:
            self._sock = sock
            self._unread.clear()
            self._bells.clear()
            self._late_ns = 0
            self._credited = (self.reader.position, self.reader.released)

    def read(self, most: int, found: list[Envelope]) -> None:
        with self._lock:
            self._read(most, found)

    def _read(self, most: int, found: list[Envelope]) -> None:
        self._hear()
        try:
            while self._bells and self._lands(*self._bells[0]):
                self._produced = self.reader.words[PRODUCED] = self._bells.popleft()[0]
                self._late_ns = 0
            super().read(most, found)
            if not self._bells:
                self._late_ns = 0
                return
        except LandingError:
            self.credit()
        self._wait_for_landing()

    @property
    def is_landing(self) -> bool:
        return self._late_ns != 0

    def may_end(self, sock: socket.socket) -> bool:
        deadline_ns = monotonic_ns() + RESUME_NS
        while self._sock is sock and not self.replaced and monotonic_ns() < deadline_ns:
            if self.finished and not self._bells:
                return True
            sleep_s(_RESUME_LOOK_S)
        return self._sock is sock

    def has_more(self) -> bool:
        return bool(self._bells) or super().has_more()

    def woken(self) -> bool:
        return False

    def rest(self) -> None:
        """The socket rings by itself."""

    def credit(self) -> None:
        """Only when it is worth a message: a quarter of the ring, an eighth of the arena."""
        at, released = self.reader.position, self.reader.released
        if at - self._credited[0] < self._ring_bytes // 4 and released - self._credited[1] < self._arena_bytes // 8:
            return
        with suppress(OSError):  # a full buffer: the next one will say more; broken: `resume` says it
            if self._sock.send(_CREDIT.pack(at, released)) != _CREDIT.size:
                self.hang_up()
        self._credited = at, released

    def close(self) -> None:
        self.reader.release()
        self._site.give_back(self._memory)

    def _hear(self) -> None:
        """Take what bells have come."""
        try:
            chunk = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:  # broken: the lane's thread sees to it
            with suppress(OSError, ValueError):  # it is out already
                self._epoll.unregister(self._sock)
            return
        unread = self._unread
        unread += chunk
        whole = len(unread) // _BELL.size * _BELL.size
        for bell in _BELL.iter_unpack(bytes(unread[:whole])):
            self._bells.append(bell)
        del unread[:whole]
        if self._bells and self._bells[-1] == (0, 0):
            self._bells.pop()
            self.finished = True

    def _landed(self, end: int, expected: int) -> bool:
        """Is the batch up to `end` there? RingError: it cannot be."""
        if not self._produced < end <= self.reader.position + self._ring_bytes:
            raise RingError(f"A bell rings for {end}, behind {self._produced}.")
        return self._sums.of_parts(self._memory.view, _parts(self._produced, end, self._ring_bytes)) == expected

    def _lands(self, end: int, expected: int) -> bool:
        """The same a moment later: the bell overtakes the write by some microseconds."""
        until_ns = monotonic_ns() + OVERTAKEN_NS
        while not self._landed(end, expected):
            if monotonic_ns() > until_ns:
                return False
            os.sched_yield()  # the engine's threads need a core to bring it
        return True

    def _wait_for_landing(self) -> None:
        """The bell was faster than the write. RingError: it never comes."""
        now_ns = monotonic_ns()
        self._late_ns = self._late_ns or now_ns
        if now_ns - self._late_ns > LANDING_NS:
            raise RingError(f"A write was rung for {LANDING_NS // NS_PER_MS} ms ago, and is not there.")
        sleep_s(_LANDING_NAP_S)


class Sums:
    """XXH3-64 that begins from a secret of two endpoints."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of(self, content: memoryview) -> int:
        return xxhash.xxh3_64_intdigest(content, self._seed)

    def of_parts(self, memory: memoryview, parts: list[tuple[int, int]]) -> int:
        if len(parts) == 1:
            ((offset, size),) = parts
            return xxhash.xxh3_64_intdigest(memory[offset : offset + size], self._seed)
        whole = xxhash.xxh3_64(seed=self._seed)
        for offset, size in parts:
            whole.update(memory[offset : offset + size])
        return whole.intdigest()


def checksum(token: str, stream: bytes) -> Sums:
    """Both ends can compute the seed, and it never travels."""
    return Sums(int.from_bytes(hmac.digest(token.encode(), b"ring" + stream, hashlib.sha256)[:8], "little"))


def _parts(start: int, end: int, ring_bytes: int) -> list[tuple[int, int]]:
    """Offsets and sizes of the ring between two positions: one part, or two where it wraps."""
    first, last = start % ring_bytes, end % ring_bytes
    if first < last or last == 0:
        return [(HEADER_BYTES + first, end - start)]
    return [(HEADER_BYTES + first, ring_bytes - first), (HEADER_BYTES, last)]
