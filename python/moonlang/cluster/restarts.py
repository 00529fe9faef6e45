"""When a process that has died is started again, and when that is no use any more."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moonlang.base.clock import NS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """first_s, most_s: waits before a restart, doubled from one death to the next. deaths: so many within window_s
    are a storm; hopeless: so many in a row without ever having been ready are one too."""

    first_s: float = 0.5
    most_s: float = 30.0
    deaths: int = 5
    window_s: float = 120.0
    hopeless: int = 3


class Restarts:
    """The deaths of one process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._deaths: deque[int] = deque(maxlen=limits.deaths)
        self._in_vain = 0

    def died(self, now_ns: int, *, was_ready: bool) -> float | None:
        """Seconds to wait before the next start; None: give up."""
        limits = self._limits
        self._in_vain = 0 if was_ready else self._in_vain + 1
        while self._deaths and now_ns - self._deaths[0] > limits.window_s * NS_PER_S:
            self._deaths.popleft()
        self._deaths.append(now_ns)
        if len(self._deaths) >= limits.deaths or self._in_vain >= limits.hopeless:
            return None
        return min(limits.first_s * 2 ** (len(self._deaths) - 1), limits.most_s)
