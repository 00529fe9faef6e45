"""Time, in one place. No other module of this package imports `time`; the brain gets `now_ns` as an argument."""

from __future__ import annotations

import time

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


def monotonic_ns() -> int:
    """Nanoseconds of CLOCK_MONOTONIC: comparable between the processes of one host, never between hosts."""
    return time.monotonic_ns()


def wall_s() -> float:
    """Seconds since the epoch, for humans and for the fields of an API that carry a date."""
    return time.time()


def sleep_s(seconds: float) -> None:
    """Block the calling thread."""
    time.sleep(seconds)
