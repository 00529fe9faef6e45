"""Lanes within one host: the ring is shared memory, the bells are eventfds; both travel over a Unix socket, once.

Afterwards the socket carries nothing. It is there to break when one side dies.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Final

from moonlang.base.errors import PeerError
from moonlang.messaging.codec import MAX_BYTES, Codec
from moonlang.mooncake import shared_memory
from moonlang.mooncake.greeting import MAX_FDS, Accepted, Hello, Talk
from moonlang.mooncake.lane import REDIAL_NS, Identity, InLane, OutLane, wait_hang_up
from moonlang.mooncake.ring import READER_SLEEPS, WRITER_WAITS, Reader, Writer, fence

_EVENTFD: Final = "anon_inode:[eventfd]"
_RETRIED: Final = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)


class NeighbourOut(OutLane):
    """The sending end; it makes the memory, so messages can be stored before the peer is there."""

    def __init__(self, identity: Identity, to: str, path: str, *, patient: bool) -> None:
        self._fd, self._memory = shared_memory.create(f"moonlang-{identity.name}-{to}", identity.geometry.total_bytes)
        super().__init__(identity, to, Writer(self._memory.view, identity.geometry), patient=patient)
        self._path = path
        self._bell = -1
        self.start()

    def publish(self) -> None:
        fence()
        words = self.writer.words
        if words[READER_SLEEPS] and self._bell >= 0:
            words[READER_SLEEPS] = 0
            os.eventfd_write(self._bell, 1)

    def close(self, linger_ns: int) -> None:
        super().close(linger_ns)
        self.writer.release()
        self._memory.close()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def _connect(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            try:
                if not self._dial(sock):
                    return
                _, fds = self._greet(sock, b"", (self._fd, self._room.fileno()))
            finally:
                os.close(self._fd)
            self._bell = _checked_bell(fds)
            self.writer.words[READER_SLEEPS] = 0
            os.eventfd_write(self._bell, 1)  # for what was stored while nobody could be woken
            self._is_up()
            if wait_hang_up(sock, self._stop):
                raise PeerError("Its process has ended, or has closed its mailbox.")

    def _dial(self, sock: socket.socket) -> bool:
        """Connect as soon as the peer is there; False when this end is closed before."""
        while True:
            try:
                sock.connect(self._path)
            except _RETRIED:
                if self._stop.wait(REDIAL_NS):
                    return False
            except OSError as error:
                raise PeerError(f"{self._path} cannot be reached: {error}.") from error
            else:
                return True


class NeighbourIn(InLane):
    """The receiving end, after the greeting."""

    def __init__(self, identity: Identity, hello: Hello, codec: Codec, talk: Talk, bell: int) -> None:
        """With the sender's memory and its own bell, which have come along. PeerError when they are something else."""
        fds = talk.fds
        if len(fds) != MAX_FDS:
            raise PeerError(f"{hello.source!r} sent {len(fds)} descriptors in place of {MAX_FDS}.")
        geometry = identity.geometry
        self._memory = shared_memory.attach(fds[0], geometry.total_bytes)
        super().__init__(identity.name, hello, Reader(self._memory.view, geometry, MAX_BYTES), codec, talk.sock)
        self._room = _checked_bell(fds[1:])
        del fds[1]  # it is ours now
        self._bell = bell
        self._much = geometry.ring_bytes // 4, geometry.arena_bytes // 4
        self._rung_at = (0, 0)  # positions in ring and arena

    def accept(self, talk: Talk) -> None:
        talk.say(Accepted(), (self._bell,))

    def credit(self) -> None:
        """Only when it is worth a switch of processes, or when there is nothing more to read."""
        fence()
        reader = self.reader
        words = reader.words
        if not words[WRITER_WAITS]:
            return
        (ring_at, arena_at), (ring_much, arena_much) = self._rung_at, self._much
        few = reader.position - ring_at < ring_much and reader.released - arena_at < arena_much
        if few and reader.has_more():
            return
        self._rung_at = reader.position, reader.released
        words[WRITER_WAITS] = 0
        with suppress(BlockingIOError):
            os.eventfd_write(self._room, 1)

    def close(self) -> None:
        self.reader.release()
        self._memory.close()
        os.close(self._room)


def _checked_bell(fds: list[int]) -> int:
    """The one descriptor in `fds`. PeerError unless it is an eventfd that never blocks."""
    if len(fds) == 1 and os.readlink(f"/proc/self/fd/{fds[0]}") == _EVENTFD and not os.get_blocking(fds[0]):
        return fds[0]
    raise PeerError("A peer sent no bell.")
