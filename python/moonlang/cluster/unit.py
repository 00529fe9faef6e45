"""A process that is kept running: what it is, how it is, and what is done when it dies."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from moonlang.base import notify
from moonlang.base.clock import monotonic_ns
from moonlang.base.errors import ConfigError
from moonlang.cluster.child import Child, Launch
from moonlang.cluster.log_file import LogFile
from moonlang.cluster.restarts import Limits, Restarts

State = Literal["starting", "ready", "draining", "waiting", "ended", "failed"]


class Unit:
    """One place in a cluster, and the process that fills it.

    role: as people know it; launch: what to start, asked for at every start. state: waiting is for a restart, ended as
    told, failed given up. url: where it answers while ready. doing and share: what it says of its start. status: of the
    last process that ended. changed: called after every change, failed: when it is given up.
    """

    def __init__(
        self,
        name: str,
        role: str,
        launch: Callable[[Unit], Launch],
        directory: Path,
        logs: Path,
        *,
        limits: Limits,
        changed: Callable[[Unit], None],
        failed: Callable[[Unit], None],
    ) -> None:
        self.name = name
        self.role = role
        self.state: State = "ended"
        self.url = ""
        self.doing = ""
        self.share: float | None = None
        self.deaths = 0
        self.status = 0
        self.since_ns = monotonic_ns()
        self.log = LogFile(logs / f"{name}.log")
        self._launch = launch
        self._directory = directory
        self._limits = limits
        self._restarts = Restarts(limits)
        self._changed = changed
        self._failed = failed
        self._child: Child | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told_to_end = False
        self._settled = asyncio.Event()  # ready, ended or failed

    @property
    def pid(self) -> int:
        """0 while there is no process."""
        return self._child.pid if self._child is not None else 0

    @property
    def last_lines(self) -> list[str]:
        return list(self.log.lines)

    def start(self) -> None:
        """Start it, and again whenever it dies."""
        self._told_to_end = False
        self._timer = None
        self._turn("starting")
        self.doing, self.share = "starting", None
        try:
            launch = self._launch(self)
            path = self._directory / f"{self.name}.notices"
            self._child = Child(launch, self._directory, self.log, path, self._said, self._ended)
        except OSError as error:
            self.log.write(f"It cannot be started: {error}.\n".encode())
            self._ended(1)

    def is_ready(self, url: str = "") -> None:
        """It takes requests, at `url`."""
        self.url = url
        self.doing, self.share = "", None
        self._turn("ready")

    async def settled(self) -> None:
        """Return as soon as it is ready, ended or given up."""
        await self._settled.wait()

    async def stop(self, patience_s: float) -> None:
        """End the process in order, or after `patience_s` at once; return when it is gone."""
        self._told_to_end = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._child is None:
            if self.state != "failed":
                self._turn("ended")
            return
        self._child.signal(signal.SIGTERM)
        if self.state != "draining":
            self._turn("draining")
        try:
            async with asyncio.timeout(patience_s):
                await self._settled.wait()
        except TimeoutError:
            self.kill()
            await self._settled.wait()

    def kill(self) -> None:
        """SIGKILL, if it runs; it is not started again."""
        self._told_to_end = True
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def close(self) -> None:
        self.log.close()

    def _said(self, notice: dict[str, str]) -> None:
        if notice.get("READY") == "1":
            self.is_ready(notice.get(notify.URL, ""))
        elif self.state == "starting" and "STATUS" in notice:
            share = float(notice[notify.SHARE]) if notify.SHARE in notice else None
            if notice["STATUS"] != self.doing or share is None or share > (self.share or 0.0):
                self.doing, self.share = notice["STATUS"], share
                self._changed(self)
        elif "STOPPING" in notice and self.state == "ready":
            self._turn("draining")

    def _ended(self, status: int) -> None:
        was_ready, self._child, self.status = self.state in ("ready", "draining"), None, status
        if self._told_to_end:
            self._turn("ended")
            return
        self.deaths += 1
        wait_s = self._restarts.died(monotonic_ns(), was_ready=was_ready)
        if wait_s is None or (status == ConfigError.exit_status and not was_ready):
            self._turn("failed")
            self._failed(self)
            return
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.start)
        self._turn("waiting")

    def _turn(self, state: State) -> None:
        self.state, self.since_ns = state, monotonic_ns()
        if state != "ready":
            self.url = ""
        if state in ("ready", "ended", "failed"):
            self._settled.set()
        else:
            self._settled.clear()
        self._changed(self)
