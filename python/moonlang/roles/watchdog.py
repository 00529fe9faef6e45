"""Notices a role whose loop no longer turns: hung in a step, stopped, or swapped to death."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Mapping

from moonlang.base.clock import monotonic_ns
from moonlang.base.wakeup import Wakeup, wait_ms
from moonlang.roles.heartbeat import Heartbeat


class Watchdog:
    """Calls `on_hang(role)` from its own thread, once for each role whose heartbeat is late."""

    def __init__(self, heartbeats: Mapping[str, Heartbeat], on_hang: Callable[[str], None]) -> None:
        self._heartbeats = heartbeats
        self._on_hang = on_hang
        self._gone: set[str] = set()
        self._stop = Wakeup()
        self._thread = threading.Thread(target=self._run, name="moonlang-watchdog", daemon=True)
        self._thread.start()

    def forget(self, name: str) -> None:
        """A role has ended, and that is all right."""
        self._gone.add(name)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._stop.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        interval_ns = min(heartbeat.interval_ns for heartbeat in self._heartbeats.values())
        while not poll.poll(wait_ms(interval_ns)):
            for name, heartbeat in self._heartbeats.items():
                if name not in self._gone and heartbeat.is_late(monotonic_ns()):
                    self._gone.add(name)
                    self._on_hang(name)
