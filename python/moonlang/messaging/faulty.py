"""A seeded fault wrapper for any Endpoint: messages get lost, come twice or come late, the same way on every run."""

from __future__ import annotations

import random
import select
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from moonlang.base.wakeup import Wakeup
from moonlang.core.messages import Envelope, Message
from moonlang.core.ports import Endpoint
from moonlang.messaging.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong with an arriving message, as probabilities in [0, 1]; at most one fault hits a message.

    A delayed message stays back for 1 to `delay_calls` further calls of `recv`, and everything behind it with it: a
    link keeps the order of its messages.
    """

    seed: int
    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    delay_calls: int = 4


class FaultyEndpoint:
    """Delivers what the inner endpoint receives, except for the faults; sequence numbers are checked behind them."""

    def __init__(self, inner: Endpoint, faults: Faults) -> None:
        self.name = inner.name
        self.dropped = 0
        self.duplicated = 0
        self.delayed = 0
        self._inner = inner
        self._faults = faults
        self._random = random.Random(faults.seed)
        self._sequence = Sequence()
        self._link: deque[Envelope] = deque()  # arrived at the inner endpoint, not delivered yet
        self._hold_calls = 0
        self._held = Wakeup()
        self._epoll = select.epoll()
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._epoll.register(self._held.fileno(), select.EPOLLIN)
        self._closed = False

    def send(self, to: str, body: Message) -> None:
        self._inner.send(to, body)

    def recv(self, most: int = 256) -> list[Envelope]:
        """Up to `most` messages; while one is held back, a call without any brings it one call nearer."""
        self._link.extend(self._inner.recv(most))
        found: list[Envelope] = []
        self._hold_calls = max(0, self._hold_calls - 1)
        while self._link and not self._hold_calls and len(found) < most:
            found.extend(self._through())
        if self._link:
            self._held.set()
        else:
            self._held.clear()
        return [envelope for envelope in found if self._sequence.admit(envelope)]

    def wait(self, timeout_ns: int, *, also: Seq[int] = ()) -> None:
        if not self._link:
            self._inner.wait(timeout_ns, also=also)

    def fileno(self) -> int:
        """Readable when a message may have come, and as long as one is held back."""
        return self._epoll.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._epoll.close()
            self._held.close()
        self._inner.close()

    def _through(self) -> Seq[Envelope]:
        """Send the first message of the link through the faults."""
        draw = self._random.random()
        faults = self._faults
        if draw < faults.delay:
            self.delayed += 1
            self._hold_calls = self._random.randint(1, faults.delay_calls)
            return ()
        envelope = self._link.popleft()
        if draw < faults.delay + faults.drop:
            self.dropped += 1
            return ()
        if draw < faults.delay + faults.drop + faults.duplicate:
            self.duplicated += 1
            return (envelope, envelope)
        return (envelope,)
