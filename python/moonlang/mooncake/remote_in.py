"""Lanes between hosts, the receiving end: believes what lies in its memory when the bell's checksum fits.

Its memory stays when the connection breaks, for the sender to go on. See `remote_out`.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Final

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s
from moonlang.core.messages import Envelope
from moonlang.messaging.codec import MAX_BYTES, Codec
from moonlang.mooncake.greeting import Accepted, Hello, Talk
from moonlang.mooncake.lane import Identity, InLane
from moonlang.mooncake.ring import PRODUCED, LandingError, Reader, RingError
from moonlang.mooncake.site import BELL, CREDIT, READ_BYTES, RESUME_NS, Site, parts_between, prepare, sums_of

LANDING_NS: Final = 2 * NS_PER_S  # a write that was rung for and is not there by then is lost
OVERTAKEN_NS: Final = 60_000  # so long a reader stays awake for a write that was rung for
_LANDING_NAP_S: Final = 20e-6
_RESUME_LOOK_S: Final = 0.02


class RemoteIn(InLane):
    """The receiving end. Its memory stays when the connection breaks, for the sender to go on."""

    def __init__(
        self, identity: Identity, hello: Hello, codec: Codec, talk: Talk, site: Site, epoll: select.epoll
    ) -> None:
        """epoll: wakes the owner; the connection is in it while it can be read."""
        geometry = identity.geometry
        self._memory = site.take(geometry.total_bytes)
        self._sums = sums_of(identity.token, hello.stream)
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
            if self._sock.send(CREDIT.pack(at, released)) != CREDIT.size:
                self.hang_up()
        self._credited = at, released

    def close(self) -> None:
        self.reader.release()
        self._site.give_back(self._memory)

    def _hear(self) -> None:
        """Take what bells have come."""
        try:
            chunk = self._sock.recv(READ_BYTES)
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
        whole = len(unread) // BELL.size * BELL.size
        for bell in BELL.iter_unpack(bytes(unread[:whole])):
            self._bells.append(bell)
        del unread[:whole]
        if self._bells and self._bells[-1] == (0, 0):
            self._bells.pop()
            self.finished = True

    def _landed(self, end: int, expected: int) -> bool:
        """Is the batch up to `end` there? RingError: it cannot be."""
        if not self._produced < end <= self.reader.position + self._ring_bytes:
            raise RingError(f"A bell rings for {end}, behind {self._produced}.")
        return self._sums.of_parts(self._memory.view, parts_between(self._produced, end, self._ring_bytes)) == expected

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
