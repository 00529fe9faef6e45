"""How much of the CPU others took while something was measured."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil


class Neighbours:
    """Watches from its construction on: this process and its descendants are ours, whatever else ran is strangers'."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._others_s = _busy_s() - _own_s()

    def share(self) -> float:
        """The part of all cores' time, in [0, 1], that strangers and other guests of the host took so far."""
        passed = (time.monotonic() - self._begin_s) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (_busy_s() - _own_s() - self._others_s) / passed))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _own_s() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
