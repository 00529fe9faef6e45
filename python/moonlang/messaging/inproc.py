"""Messages between the threads of one process: for `--in-process`, tests and the simulator's edges.

They are encoded and decoded like those of any other backend, so that what works in one process works between several.
"""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup, wait_ms
from moonlang.core.messages import Envelope, Message
from moonlang.messaging.codec import Codec
from moonlang.messaging.sequence import Sequence

CAPACITY = 8192
SEND_TIMEOUT_NS = 1 * NS_PER_S


class _Inbox:
    """A bounded queue of frames with a descriptor that is readable exactly while frames are in it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._frames: deque[bytes] = deque()
        self._room = threading.Condition()
        self._closed = False
        self.filled = Wakeup()

    def put(self, frame: bytes, timeout_s: float) -> bool:
        """False when there was no room within the time; PeerError when the owner has closed it."""
        with self._room:
            self._room.wait_for(lambda: self._closed or len(self._frames) < self._capacity, timeout_s)
            if self._closed:
                raise PeerError("The peer has closed its inbox.")
            if len(self._frames) >= self._capacity:
                return False
            self._frames.append(frame)
            if len(self._frames) == 1:
                self.filled.set()
            return True

    def take(self, most: int) -> list[bytes]:
        with self._room:
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            if taken:
                if not self._frames:
                    self.filled.clear()
                self._room.notify_all()
            return taken

    def close(self) -> None:
        with self._room:
            if not self._closed:
                self._closed = True
                self._frames.clear()
                self.filled.close()
                self._room.notify_all()


class Hub:
    """The inboxes of one group of roles. Messages may be sent to a role before it has opened its endpoint."""

    def __init__(self, names: Iterable[str], *, capacity: int = CAPACITY) -> None:
        self.inboxes = {name: _Inbox(capacity) for name in names}

    def close(self) -> None:
        """Close every inbox, also those that no endpoint was opened for."""
        for inbox in self.inboxes.values():
            inbox.close()


class InprocEndpoint:
    """An Endpoint over the queues of a Hub."""

    def __init__(self, name: str, hub: Hub, *, send_timeout_ns: int = SEND_TIMEOUT_NS) -> None:
        self.name = name
        self._hub = hub
        self._inbox = hub.inboxes[name]
        self._send_timeout_ns = send_timeout_ns
        self._codec = Codec()
        self._sequence = Sequence()

    def send(self, to: str, body: Message) -> None:
        """Queue one message. PeerError when the peer makes no room in time, is closed, or is unknown."""
        inbox = self._hub.inboxes.get(to)
        if inbox is None:
            raise PeerError(f"{self.name!r} knows no peer {to!r}.")
        frame = self._codec.encode(Envelope(to=to, source=self.name, seq=self._sequence.peek(to), body=body))
        if not inbox.put(frame, self._send_timeout_ns / NS_PER_S):
            raise PeerError(f"The inbox of {to!r} stays full for {self._send_timeout_ns // NS_PER_MS} ms.")
        self._sequence.sent(to)

    def recv(self, most: int = 256) -> list[Envelope]:
        """Up to `most` messages that have arrived; never blocks."""
        envelopes = map(self._codec.decode, self._inbox.take(most))
        return [envelope for envelope in envelopes if self._sequence.admit(envelope)]

    def wait(self, timeout_ns: int, *, also: Seq[int] = ()) -> None:
        """Block until a message is there, a descriptor in `also` is readable, or the time is up (whole ms)."""
        poll = select.poll()
        for fd in (self._inbox.filled.fileno(), *also):
            poll.register(fd, select.POLLIN)
        poll.poll(wait_ms(timeout_ns))

    def fileno(self) -> int:
        """Readable exactly while messages wait."""
        return self._inbox.filled.fileno()

    def close(self) -> None:
        """Refuse further messages. May be called twice."""
        self._inbox.close()


BACKEND = InprocEndpoint
