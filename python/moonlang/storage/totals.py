"""What a store has done and why it has not, for metrics and for the log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moonlang.base import log
from moonlang.base.clock import NS_PER_S

_log = log.get(__name__)

_REPEAT_NS = 60 * NS_PER_S  # the same complaint is not logged again before


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """A snapshot. Latency (busy_ns over ops) is that of whole ops."""

    loaded_bytes: int = 0
    saved_bytes: int = 0
    ops: int = 0
    busy_ns: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # by cause


class Ledger:
    """Adds up from any thread."""

    def __init__(self, name: str, clock: Callable[[], int]) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._totals = StoreTotals()
        self._logged: dict[str, tuple[int, int]] = {}  # cause -> when, and how many since

    def snapshot(self) -> StoreTotals:
        with self._lock:
            return replace(self._totals, failures=dict(self._totals.failures))

    def moved(self, *, loaded: int = 0, saved: int = 0) -> None:
        """Bytes."""
        with self._lock:
            old = self._totals
            self._totals = replace(old, loaded_bytes=old.loaded_bytes + loaded, saved_bytes=old.saved_bytes + saved)

    def carried_out(self, ns: int) -> None:
        """One op took so long."""
        with self._lock:
            self._totals = replace(self._totals, ops=self._totals.ops + 1, busy_ns=self._totals.busy_ns + ns)

    def failed(self, cause: str, count: int = 1) -> None:
        with self._lock:
            self._totals.failures[cause] = self._totals.failures.get(cause, 0) + count

    def complain(self, cause: str, text: str) -> None:
        """Count a failure and log it, unless the same cause has been logged a short while ago."""
        self.failed(cause)
        self._log_once(logging.WARNING, cause, text)

    def recovered(self, text: str) -> None:
        self._log_once(logging.INFO, "recovered", text)

    def _log_once(self, level: int, cause: str, text: str) -> None:
        now_ns = self._clock()
        with self._lock:
            since_ns, silent = self._logged.get(cause, (now_ns - _REPEAT_NS, 0))
            if now_ns - since_ns < _REPEAT_NS:
                self._logged[cause] = since_ns, silent + 1
                return
            self._logged[cause] = now_ns, 0
        more = f" ({silent} times more in between)" if silent else ""
        _log.log(level, "KV store %s: %s%s", self._name, text, more)
