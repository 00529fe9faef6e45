"""Sequence numbers of one endpoint: every pair (source, to) counts its messages from 0 without gaps."""

from __future__ import annotations

from moonlang.base import log
from moonlang.core.messages import Envelope

_log = log.get(__name__)


class Sequence:
    """Stamps what goes out, checks what comes in: a repeat is dropped, a gap is reported."""

    def __init__(self) -> None:
        self._next_out: dict[str, int] = {}
        self._next_in: dict[str, int] = {}
        self.gaps = 0
        self.repeats = 0

    def peek(self, to: str) -> int:
        """The number the next message to `to` will carry."""
        return self._next_out.get(to, 0)

    def sent(self, to: str) -> None:
        """The message with the number from `peek` is on its way."""
        self._next_out[to] = self.peek(to) + 1

    def admit(self, envelope: Envelope) -> bool:
        """True when `envelope` is to be delivered."""
        expected = self._next_in.get(envelope.source, 0)
        if envelope.seq < expected:
            self.repeats += 1
            _log.error(
                "Message %d from %s came again and is dropped (%d is next).", envelope.seq, envelope.source, expected
            )
            return False
        if envelope.seq > expected:
            self.gaps += 1
            _log.error("Messages %d to %d from %s are lost.", expected, envelope.seq - 1, envelope.source)
        self._next_in[envelope.source] = envelope.seq + 1
        return True
