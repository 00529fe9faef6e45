"""One message to all workers of a group: written once, and one system call wakes all who sleep.

The bell is an eventfd that nobody reads: each worker waits for it edge-triggered, in an epoll of its own, so a single
write reaches all of them and none takes the wake-up away from another.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import wait_ms
from moonlang.messaging.codec import MAX_BYTES
from moonlang.mooncake import shared_memory
from moonlang.mooncake.ring import (
    CONSUMED,
    DEFAULT_GEOMETRY,
    INLINE_BYTES,
    READER_SLEEPS,
    WRITER_WAITS,
    Geometry,
    Reader,
    Writer,
    fence,
)


@dataclass(frozen=True, slots=True)
class Handles:
    """What a worker needs: inherited (pass_fds) or sent over a Unix socket."""

    memory: int
    bell: int
    room: int


class Broadcast:
    """The sending end. Owned by one thread."""

    def __init__(self, workers: int, geometry: Geometry = DEFAULT_GEOMETRY) -> None:
        geometry = replace(geometry, readers=workers)
        geometry.check()
        fd, self._memory = shared_memory.create("moonlang-broadcast", geometry.total_bytes)
        self._geometry = geometry
        self._writer = Writer(self._memory.view, geometry)
        self._sleeps = [geometry.word(READER_SLEEPS, slot) for slot in range(workers)]
        for word in self._sleeps:  # the first message rings: workers come when they like
            self._writer.words[word] = 1
        bell, room = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.handles = Handles(fd, bell, room)
        self._poll = select.poll()
        self._poll.register(room, select.POLLIN)

    def send(self, frame: bytes | bytearray, timeout_ns: int = NS_PER_S) -> None:
        """To every worker. PeerError: some make no room for so long; the message says which."""
        if len(frame) <= INLINE_BYTES and self._writer.put(frame):
            self._ring()
            return
        deadline_ns = monotonic_ns() + timeout_ns
        for stored in self._writer.put_large(frame):
            self._ring()
            if stored:
                deadline_ns = monotonic_ns() + timeout_ns
            else:
                self._wait_room(deadline_ns, timeout_ns)

    def close(self) -> None:
        self._writer.release()
        self._memory.close()
        for fd in (self.handles.memory, self.handles.bell, self.handles.room):
            os.close(fd)

    def _ring(self) -> None:
        fence()
        words = self._writer.words
        asleep = [word for word in self._sleeps if words[word]]
        if asleep:
            for word in asleep:
                words[word] = 0
            os.eventfd_write(self.handles.bell, 1)

    def _wait_room(self, deadline_ns: int, timeout_ns: int) -> None:
        left_ns = deadline_ns - monotonic_ns()
        words = self._writer.words
        if left_ns <= 0:
            raise PeerError(f"Workers {self._slowest()} have taken nothing for {timeout_ns // NS_PER_MS} ms.")
        if words[WRITER_WAITS]:
            self._poll.poll(wait_ms(left_ns))
        with suppress(BlockingIOError):
            os.eventfd_read(self.handles.room)
        words[WRITER_WAITS] = 1
        fence()

    def _slowest(self) -> list[int]:
        """The workers that are furthest behind."""
        words = self._writer.words
        at = [words[self._geometry.word(CONSUMED, slot)] for slot in range(self._geometry.readers)]
        return [slot for slot, position in enumerate(at) if position == min(at)]


class Subscription:
    """The receiving end of worker `slot`. Owned by one thread."""

    def __init__(self, handles: Handles, slot: int, workers: int, geometry: Geometry = DEFAULT_GEOMETRY) -> None:
        """PeerError when the memory has another size, or there is no such worker."""
        if not 0 <= slot < workers:
            raise PeerError(f"There is no worker {slot} of {workers}.")
        geometry = replace(geometry, readers=workers)
        self._memory = shared_memory.attach(handles.memory, geometry.total_bytes)
        self._reader = Reader(self._memory.view, geometry, MAX_BYTES, slot=slot)
        self._sleeps = geometry.word(READER_SLEEPS, slot)
        self._room = handles.room
        self._epoll = select.epoll()
        self._epoll.register(handles.bell, select.EPOLLIN | select.EPOLLET)

    def recv(self, most: int = 256) -> list[bytes]:
        """Up to `most` messages; never blocks. Without any, the next one will ring."""
        found: list[bytes] = []

        def deliver(frame: memoryview | bytearray) -> bool:
            found.append(bytes(frame))
            return True

        before = self._reader.position
        self._reader.read(most, deliver)
        words = self._reader.words
        if self._reader.position != before:
            fence()
            if words[WRITER_WAITS]:
                words[WRITER_WAITS] = 0
                os.eventfd_write(self._room, 1)
        return found

    def fileno(self) -> int:
        """Readable from a ring of the bell on, until `rest`."""
        return self._epoll.fileno()

    def rest(self) -> bool:
        """From now on the sender rings. False when something is there already."""
        self._epoll.poll(0)  # the edge has been seen
        self._reader.words[self._sleeps] = 1
        fence()
        return not self._reader.has_more()

    def wait(self, timeout_ns: int, *, also: Sequence[int] = ()) -> None:
        """Block until a message is there, a descriptor in `also` is readable, or the time is up (whole ms)."""
        self._reader.words[self._sleeps] = 1
        fence()
        if self._reader.has_more():
            return
        if not also:
            self._epoll.poll(wait_ms(timeout_ns) / 1000)
            return
        poll = select.poll()
        for fd in (self._epoll.fileno(), *also):
            poll.register(fd, select.POLLIN)
        poll.poll(wait_ms(timeout_ns))
        self._epoll.poll(0)  # the edge has been seen

    def close(self) -> None:
        self._epoll.close()
        self._reader.release()
        self._memory.close()
