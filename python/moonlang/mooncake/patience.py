"""Whether a reader stays awake for its next message: waking a core that sleeps may take longer than the answer does.

Going to sleep and being woken costs some ten microseconds of computing and, where the core has nothing else to do, up
to a hundred of waiting, most of all in a virtual machine. So a reader whose last messages came shortly after each other
looks for the next one a moment longer before it sleeps. It must never cost much where it does not help:

- It stays awake only after several short waits in a row, and after each time in vain only after twice as many. Where
  both sides share a core it is always in vain: the reader is in the way of what it waits for.
- It pays for it from an allowance that grows by a few percent of the time. What it saves is taken off: a wait that is
  over before a sleep would have begun to pay costs nothing.
- A look that takes long shows that somebody else needs the core: that ends it, as one in vain.
- With one core nobody could send meanwhile: it always sleeps.
"""

from __future__ import annotations

import os
from typing import Final

from moonlang.base.clock import NS_PER_MS

STAY_NS: Final = 100_000  # how long at most: about what a core takes to wake up
SHORT_NS: Final = 250_000  # a wait asleep that might have been shorter than STAY_NS with both sides awake
FREE_NS: Final = 20_000  # what a sleep costs anyhow
LOOK_NS: Final = 50_000  # a look that took longer: somebody else had the core
FEW, MANY = 4, 64  # short waits in a row that are asked for
_SHARE: Final = 32  # the allowance grows by one part in so many of the time
_MOST_NS: Final = 2 * NS_PER_MS  # that can be saved up


class Patience:
    """Of one reader. Pure: times (ns) are arguments."""

    def __init__(self, cores: int | None = None) -> None:
        """cores: that this process may use; found out if left out."""
        self.short = 0  # waits in a row
        self.needed = FEW
        self._never = (len(os.sched_getaffinity(0)) if cores is None else cores) < 2
        self._allowance_ns = _MOST_NS
        self._begun_ns = 0

    def begin(self, now_ns: int) -> bool:
        """A wait begins: stay awake for a moment?"""
        passed_ns, self._begun_ns = now_ns - self._begun_ns, now_ns
        self._allowance_ns = min(self._allowance_ns + passed_ns // _SHARE, _MOST_NS)
        return self.short >= self.needed and self._allowance_ns >= STAY_NS and not self._never

    def awake(self, now_ns: int) -> None:
        """The message came while the reader was awake."""
        self._allowance_ns -= max(0, now_ns - self._begun_ns - FREE_NS)
        self.needed = max(FEW, self.needed // 2)

    def in_vain(self, now_ns: int) -> None:
        """It did not, and now the reader sleeps."""
        self._allowance_ns -= now_ns - self._begun_ns
        self.needed = min(2 * self.needed, MANY)
        self.short = 0

    def asleep(self, now_ns: int, message: bool) -> None:
        """The sleep is over, by a message or by something else."""
        self.short = self.short + 1 if message and now_ns - self._begun_ns <= SHORT_NS else 0
