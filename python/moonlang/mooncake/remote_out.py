"""Lanes between hosts, the sending end: Mooncake's transfer engine writes the ring into the receiver's memory.

The sender keeps a copy of the whole ring: what was stored goes out as one contiguous write per batch (two where the
ring wraps). A TCP connection beside it carries a bell per batch (how far the ring is valid, and the checksum of the
batch), and the receiver's credits back. The bell is sent while the write is under way, so that the reader wakes up
meanwhile; it believes what lies in its memory when the checksum fits. Bodies in the arena are written before the batch
that refers to them, and have checksums of their own. A small batch needs no write: it travels with its bell, which is
under way anyhow, and the reader puts it where the write would have.

Nobody who can merely reach the transfer engine's port can make up a message: positions and checksums come over the
connection that was greeted with the cluster's token, and checksums begin from a secret number.

A connection that breaks while both processes live is resumed: the receiver says how far it has come, the sender writes
the rest again to where it was written before, which changes nothing if it had arrived.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.mooncake.engine import Peer
from moonlang.mooncake.lane import REDIAL_NS, Identity, OutLane
from moonlang.mooncake.ring import CONSUMED, RELEASED, WRITER_WAITS, Block, RingError, Writer
from moonlang.mooncake.site import (
    BELL,
    CARRIED_BYTES,
    CREDIT,
    GOODBYE,
    READ_BYTES,
    RESUME_NS,
    Site,
    parts_between,
    prepare,
    sums_of,
)
from moonlang.mooncake.wheel import DONE, PENDING

MAX_FLIGHTS: Final = 8  # writes of one lane under way; what is stored meanwhile makes the next batch
MAX_TRIES: Final = 2  # of one write
CONNECT_S: Final = 1.0
LEAVE_NS: Final = 200 * NS_PER_MS  # how long a lane that is closed waits for its last writes
_QUIET_LOOKS: Final = 20  # of which none found anything to do; then the thread sleeps until it is poked
_LOOK_MS: Final = 1  # how often the lane's thread asks after writes under way

_log = log.get(__name__)


@dataclass(slots=True)
class _Flight:
    """A write under way."""

    handle: int
    offset: int
    size: int
    tries: int = 1


class RemoteOut(OutLane):
    """The sending end. The owner's thread stores and sends, the lane's thread takes credits and sees to the rest."""

    def __init__(self, identity: Identity, to: str, address: tuple[str, int], site: Site, *, patient: bool) -> None:
        self._stream = secrets.token_bytes(16)
        geometry = identity.geometry
        self._memory = site.take(geometry.total_bytes)
        sums = sums_of(identity.token, self._stream)
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
        self._bells = bytearray()  # and what they carry, as far as the connection has not taken it yet
        self._poke = Wakeup()  # the lane's thread has something to look after
        self.start()

    def publish(self) -> None:
        with self._lock:
            self._send()
            if not self._gone_out() and not self._poke.is_set:
                self._poke.set()

    def close(self, linger_ns: int) -> None:
        super().close(linger_ns)
        self.writer.release()
        self._site.give_back(self._memory)
        self._poke.close()

    def _send(self) -> None:
        """Hand over what was stored, unless enough is under way, and ring for it."""
        end = self.writer.position
        if self._sock is None:
            return
        if self._flights:
            self._land()
        self._flush()
        if end == self._sent or self._bells or len(self._flights) >= MAX_FLIGHTS:
            return
        for block in self.writer.blocks:
            self._take_off(block.offset, block.size)
        self._blocks += self.writer.blocks
        self.writer.blocks.clear()
        memory = self._memory.view
        parts = parts_between(self._sent, end, self._ring_bytes)
        carried = end - self._sent if end - self._sent <= CARRIED_BYTES else 0
        self._bells += BELL.pack(end, self._sums.of_parts(memory, parts), carried)
        for offset, size in parts:
            if carried:
                self._bells += memory[offset : offset + size]
            else:
                self._take_off(offset, size)
        self._sent = end
        self._flush()

    def _flush(self) -> None:
        """As much as the connection takes."""
        if self._bells and self._sock is not None:
            try:
                sent = self._sock.send(self._bells)
            except BlockingIOError:
                return
            except OSError:
                self._break()
                return
            del self._bells[:sent]

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
            self._bells.clear()
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
                    if self._gone_out():
                        with suppress(OSError):
                            sock.send(GOODBYE)
                    return False
                if quiet_looks == _QUIET_LOOKS:
                    self._poke.clear()
                    poll.register(self._poke.fileno(), select.POLLIN)
                elif poked:
                    poll.unregister(self._poke.fileno())  # it stays set while somebody looks

    def _gone_out(self) -> bool:
        return not self._flights and not self._bells and self._sent == self.writer.position

    def _take_credits(self, sock: socket.socket, unread: bytearray) -> bool:
        """False when the connection is broken."""
        try:
            chunk = sock.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        unread += chunk
        whole = len(unread) // CREDIT.size * CREDIT.size
        if whole:
            with self._lock:
                self._credit(*CREDIT.unpack_from(unread, whole - CREDIT.size))
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
