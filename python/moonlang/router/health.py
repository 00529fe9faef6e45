"""Watches the workers: one task for each asks whether it is alive and, when it comes up, who it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from moonlang.base import clock, log
from moonlang.router.upstream import refuses
from moonlang.router.workers import Worker, WorkerSet

_log = log.get(__name__)

RECHECK_S = 0.25  # how often a worker is asked that is not up, or about to be down
FACTS = ("model_path", "served_model_name", "disaggregation_mode", "tp_size", "dp_size")
_MODE = {"regular": "null", "prefill": "prefill", "decode": "decode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """How workers are checked. path: answers 200 when all is well; headers: with the key that workers want."""

    interval_s: float
    timeout_s: float
    path: str
    headers: dict[str, str]


class Watch:
    """The tasks that watch the workers of a set."""

    def __init__(self, workers: WorkerSet, session: aiohttp.ClientSession, checks: Checks) -> None:
        self._workers = workers
        self._session = session
        self._checks = checks
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._farewells: set[asyncio.Task[None]] = set()

    def start(self, worker: Worker) -> None:
        """From now on this worker is watched."""
        self._tasks[worker.id] = asyncio.create_task(self._follow(worker), name=f"watch {worker.url}")

    def dismiss(self, worker: Worker) -> None:
        """It gets no more requests, and is forgotten when those it has are done."""
        if not worker.leaving:
            worker.leaving = True
            task = asyncio.create_task(self._see_off(worker))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    async def close(self) -> None:
        """Stop watching."""
        tasks = [*self._tasks.values(), *self._farewells]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _see_off(self, worker: Worker) -> None:
        await worker.idle.wait()
        self._tasks.pop(worker.id).cancel()
        self._workers.discard(worker)
        _log.info("Worker %s has left", worker.url)

    async def _follow(self, worker: Worker) -> None:
        while True:
            worker.wanted.clear()
            asked_ns = clock.monotonic_ns()
            alive = await self._alive(worker)
            if alive and not worker.up:
                alive = await self._introduced(worker)
            if not alive and worker.up and worker.heard_ns >= asked_ns:
                alive = True  # busy, but it speaks: streams that move on are not cut
            if worker.checked(alive):
                _log.info("Worker %s (%s) is %s", worker.url, worker.kind, "up" if worker.up else "down")
            settled = alive and worker.up
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._checks.interval_s if settled else RECHECK_S):
                    await worker.wanted.wait()

    async def _alive(self, worker: Worker) -> bool:
        found = await self._get(worker, self._checks.path, lambda status, body: status == 200)
        return bool(found)

    async def _introduced(self, worker: Worker) -> bool:
        """Learn what the worker says of itself. False when it does not get that far."""
        found = await self._get(worker, "/server_info", lambda status, body: body if status == 200 else b"{}")
        if found is None:
            return False
        try:
            info = msgspec.json.decode(found, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError):
            info = {}
        worker.facts = {name: str(info[name]) for name in FACTS if info.get(name) is not None}
        mode, wanted = worker.facts.get("disaggregation_mode"), _MODE[worker.kind]
        before, worker.problem = worker.problem, ""
        if mode is not None and mode != wanted:
            worker.problem = f"It runs with --disaggregation-mode {mode}, and is used as a {worker.kind} worker."
            if worker.problem != before:
                _log.error("Worker %s cannot be used. %s", worker.url, worker.problem)
        port = info.get("disaggregation_bootstrap_port")
        if worker.kind == "prefill" and not worker.port_given and isinstance(port, int):
            worker.bootstrap_port = port
        return True

    async def _get(self, worker: Worker, path: str, read: Callable[[int, bytes], Any]) -> Any:
        """What `read` makes of status and body of a GET; None when there is no answer in time."""
        limit = aiohttp.ClientTimeout(total=self._checks.timeout_s)
        try:
            async with self._session.get(worker.url + path, headers=self._checks.headers, timeout=limit) as response:
                return read(response.status, await response.read())
        except aiohttp.ClientConnectorError as error:
            if refuses(error) and worker.lost():
                _log.warning("Worker %s (%s) is down: it takes no connections", worker.url, worker.kind)
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass  # it has not answered: that is all there is to know
        return None
