"""The circuit breaker of one worker: after many failures it gets no requests for a while, then it is on probation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "half_open", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """`failures` within window_ns open it for open_ns, 0 never; `successes` in a row close it again."""

    failures: int
    successes: int
    open_ns: int
    window_ns: int


class Breaker:
    """closed: requests pass. open: none does. half_open, some time later: they pass, and the first failure opens it."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._failed_ns: deque[int] = deque(maxlen=max(limits.failures, 1))
        self._opened_ns: int | None = None
        self._successes = 0

    def state(self, now_ns: int) -> State:
        if self._opened_ns is None:
            return "closed"
        return "half_open" if now_ns - self._opened_ns >= self._limits.open_ns else "open"

    def succeeded(self, now_ns: int) -> None:
        """A request was answered."""
        if self.state(now_ns) != "half_open":
            return
        self._successes += 1
        if self._successes >= self._limits.successes:
            self.reset()

    def failed(self, now_ns: int) -> None:
        """A request failed, and the worker is to blame."""
        limits = self._limits
        if not limits.failures:
            return
        if self._opened_ns is not None:
            self._open(now_ns)
            return
        self._failed_ns.append(now_ns)
        if len(self._failed_ns) == limits.failures and now_ns - self._failed_ns[0] <= limits.window_ns:
            self._open(now_ns)

    def reset(self) -> None:
        """Closed, as at the start."""
        self._opened_ns = None
        self._failed_ns.clear()
        self._successes = 0

    def _open(self, now_ns: int) -> None:
        self._opened_ns = now_ns
        self._successes = 0
