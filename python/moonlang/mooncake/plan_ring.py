"""The line on which rank 0 hands its plans to the other ranks of its host, as a ring that all of them read.

The socket on which they meet carries the ring's descriptors, once. Then it is there to break when one side dies.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import suppress

from moonlang.base.clock import NS_PER_S
from moonlang.base.errors import PeerError
from moonlang.messaging.plan_line import JOIN_S, SEND_S, accept, connect
from moonlang.mooncake.broadcast import Broadcast, Handles, Subscription

_SEAT = struct.Struct("<II")  # slot of a reader, number of readers
_HANDLES = 3


class PlanRingSender:
    """Rank 0's end: see `messaging.plan_line.PlanSender`."""

    def __init__(self, address: str, receivers: int, join_s: float = JOIN_S, token: str = "") -> None:
        self._peers = accept(address, receivers, join_s, token)
        self._plans = Broadcast(receivers)
        handles = self._plans.handles
        for slot, peer in enumerate(self._peers):
            peer.settimeout(SEND_S)
            fds = [handles.memory, handles.bell, handles.room]
            try:
                socket.send_fds(peer, [_SEAT.pack(slot, receivers)], fds)
            except OSError as error:
                self.close()
                raise PeerError(f"A rank that came has gone again: {error}.") from error

    def send(self, frame: bytes) -> None:
        """To every receiver, in order. PeerError when one no longer reads."""
        self._plans.send(frame, int(SEND_S * NS_PER_S))

    def close(self) -> None:
        """What was sent is still read."""
        self._plans.close()
        for peer in self._peers:
            peer.close()


class PlanRingReceiver:
    """The end of any other rank: see `messaging.plan_line.PlanReceiver`."""

    def __init__(self, address: str, join_s: float = JOIN_S, token: str = "") -> None:
        self.ended = False
        self._fds: list[int] = []
        self._lifeline = connect(address, join_s, token)
        try:
            said, self._fds, _, _ = socket.recv_fds(self._lifeline, _SEAT.size, _HANDLES, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            said = b""
        if len(self._fds) != _HANDLES or len(said) != _SEAT.size:
            self._hang_up()
            raise PeerError("Rank 0 is gone, or hands out its plans in another way.")
        self._lifeline.setblocking(False)
        slot, readers = _SEAT.unpack(said)
        try:
            self._plans = Subscription(Handles(*self._fds), slot, readers)
        except BaseException:
            self._hang_up()
            raise
        self._epoll = select.epoll()
        for fd in (self._plans.fileno(), self._lifeline.fileno()):
            self._epoll.register(fd, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when `recv` has something."""
        return self._epoll.fileno()

    def recv(self) -> list[bytes]:
        """The frames that have come; never blocks. PeerError when they cannot be."""
        frames = self._drain()
        if not frames and self._is_gone():
            frames = self._drain()  # what rank 0 has stored before it went
            self.ended = not frames
        return frames

    def wait(self, timeout_s: float) -> None:
        """Block until there is something to receive."""
        self._epoll.poll(timeout_s)

    def close(self) -> None:
        self._epoll.close()
        self._plans.close()
        self._hang_up()

    def _drain(self) -> list[bytes]:
        """All that is there; afterwards the next frame will ring."""
        frames = self._plans.recv()
        while not self._plans.rest():
            frames += self._plans.recv()
        return frames

    def _is_gone(self) -> bool:
        with suppress(BlockingIOError):
            return not self._lifeline.recv(1)
        return False

    def _hang_up(self) -> None:
        self._lifeline.close()
        while self._fds:
            os.close(self._fds.pop())
