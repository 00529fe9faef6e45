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
from typing import Final, NamedTuple

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s
from moonlang.core.messages import Envelope
from moonlang.messaging.codec import MAX_BYTES, Codec
from moonlang.mooncake.greeting import Accepted, Hello, Talk
from moonlang.mooncake.lane import Identity, InLane
from moonlang.mooncake.ring import PRODUCED, LandingError, Reader, RingError
from moonlang.mooncake.site import (
    BELL,
    CARRIED_BYTES,
    CREDIT,
    READ_BYTES,
    RESUME_NS,
    Site,
    parts_between,
    prepare,
    sums_of,
)

LANDING_NS: Final = 2 * NS_PER_S  # a write that was rung for and is not there by then is lost
OVERTAKEN_NS: Final = 60_000  # so long a reader stays awake for a write that was rung for
_LANDING_NAP_S: Final = 20e-6
_LANDING_BYTES_PER_S: Final = 4e9  # a larger body is looked at again after the time that a write of it takes at best
_RESUME_LOOK_S: Final = 0.02
_MAX_BELLS: Final = 4096  # that wait for what they ring for; the rest waits in the connection


class _Bell(NamedTuple):
    """end: position behind the batch. content: the batch itself, when the bell carries it."""

    end: int
    checksum: int
    content: bytes


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
        self._bells: deque[_Bell] = deque()
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
        size = 0
        try:
            while self._bells and self._lands(self._bells[0]):
                self._produced = self.reader.words[PRODUCED] = self._bells.popleft().end
                self._late_ns = 0
            super().read(most, found)
            if not self._bells:
                self._late_ns = 0
                return
        except LandingError as error:
            self.credit()
            size = error.size
        self._wait_for_landing(size)

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
        """Take what bells have come. RingError: one carries what it cannot."""
        if len(self._bells) >= _MAX_BELLS:
            return
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
        at = 0
        while len(unread) - at >= BELL.size:
            end, checksum, carried = BELL.unpack_from(unread, at)
            if carried > CARRIED_BYTES:
                raise RingError(f"A bell carries {carried} bytes, more than {CARRIED_BYTES}.")
            start = at + BELL.size
            if len(unread) - start < carried:
                break
            at = start + carried
            if end == 0:
                self.finished = True
            else:
                self._bells.append(_Bell(end, checksum, bytes(unread[start:at])))
        del unread[:at]

    def _landed(self, bell: _Bell) -> bool:
        """Is the batch there? RingError: it cannot be."""
        if not self._produced < bell.end <= self.reader.position + self._ring_bytes:
            raise RingError(f"A bell rings for {bell.end}, behind {self._produced}.")
        memory = self._memory.view
        parts = parts_between(self._produced, bell.end, self._ring_bytes)
        if bell.content:
            self._put(bell.content, parts, bell.end - self._produced)
        return self._sums.of_parts(memory, parts) == bell.checksum

    def _put(self, content: bytes, parts: list[tuple[int, int]], size: int) -> None:
        """What a bell carries, to where a write would have brought it."""
        if len(content) != size:
            raise RingError(f"A bell for {size} bytes carries {len(content)}.")
        at = 0
        for offset, length in parts:
            self._memory.view[offset : offset + length] = content[at : at + length]
            at += length

    def _lands(self, bell: _Bell) -> bool:
        """The same a moment later: the bell overtakes the write by some microseconds."""
        until_ns = monotonic_ns() + OVERTAKEN_NS
        while not self._landed(bell):
            if monotonic_ns() > until_ns:
                return False
            os.sched_yield()  # the engine's threads need a core to bring it
        return True

    def _wait_for_landing(self, size: int) -> None:
        """The bell was faster than the write. RingError: it never comes."""
        now_ns = monotonic_ns()
        nap_s = max(_LANDING_NAP_S, size / _LANDING_BYTES_PER_S)
        if self._late_ns:  # it is late: look more often
            nap_s = max(_LANDING_NAP_S, nap_s / 5)
        self._late_ns = self._late_ns or now_ns
        if now_ns - self._late_ns > LANDING_NS:
            raise RingError(f"A write was rung for {LANDING_NS // NS_PER_MS} ms ago, and is not there.")
        sleep_s(nap_s)
