"""A prefill and a decode server as a user starts them, and requests that reach both, with or without a router."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
from free_ports import free_port
from live_server import LiveProcess, LiveServer

from moonlang.base import clock

FLAGS = ("--max-total-tokens", "20000", "--random-seed", "1", "--constrained-json-disable-any-whitespace")
HOST = "127.0.0.1"


class PdServer(LiveServer):
    """One half. role: prefill or decode; port: of the bootstrap server."""

    def __init__(self, folder: Path, role: str, port: int, backend: str, *flags: str) -> None:
        pd = ("--disaggregation-mode", role, "--disaggregation-transfer-backend", backend)
        super().__init__(folder, *pd, "--disaggregation-bootstrap-port", str(port), *FLAGS, *flags)

    @property
    def scheduler(self) -> int:
        """The process that holds the pages."""
        return self.roles()["scheduler"]

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.kill(self.scheduler, how)

    def pairs(self) -> dict[str, int]:
        """The first scheduler's numbers of its pairs."""
        return self.load()["pairs"]  # type: ignore[return-value]

    def wait_free(self, timeout_s: float = 90) -> None:
        """Nothing runs, waits, moves or is in quarantine any more."""
        self.wait_idle(timeout_s)
        busy = ("num_pairing", "num_moving", "num_transfers", "quarantined_pages")
        self.until(lambda: not any(load["pairs"][name] for load in self.loads() for name in busy), timeout_s)  # type: ignore[index]


class Couple:
    """A prefill and a decode server that can be asked directly, as a router would."""

    _rooms: ClassVar[Iterator[int]] = itertools.count(1)  # servers may be in several couples

    def __init__(self, prefill: PdServer, decode: PdServer, bootstrap_port: int) -> None:
        self.prefill = prefill
        self.decode = decode
        self.bootstrap_port = bootstrap_port
        self._pool = ThreadPoolExecutor(32)
        self._http = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=64))

    def submit(self, body: dict[str, Any]) -> tuple[Future[httpx.Response], Future[httpx.Response]]:
        """Send a request to both; the answers of prefill and decode."""
        paired = {
            **body,
            "bootstrap_host": HOST,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": next(self._rooms),
        }
        first, second = (
            self._pool.submit(self._http.post, f"{one.url}/generate", json=paired)
            for one in (self.prefill, self.decode)
        )
        return first, second

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        """The answer of decode."""
        return self.submit(body)[1].result()

    def wait_free(self) -> None:
        for one in (self.prefill, self.decode):
            one.wait_free()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()


@contextmanager
def couple(
    folder: Path, backend: str, *flags: str, prefill: tuple[str, ...] = (), decode: tuple[str, ...] = ()
) -> Iterator[Couple]:
    """Both servers, up."""
    port = free_port()
    with ExitStack() as stack:
        first = PdServer(folder, "prefill", port, backend, *flags, *prefill)
        second = PdServer(folder, "decode", port, backend, *flags, *decode)
        stack.enter_context(first)
        stack.enter_context(second)
        both = Couple(first, second, port)
        stack.callback(both.close)
        yield both


class PdRouter(LiveProcess):
    """A router in front of a couple."""

    def __init__(self, folder: Path, couple: Couple) -> None:
        workers = ("--prefill", couple.prefill.url, str(couple.bootstrap_port), "--decode", couple.decode.url)
        quick = ("--health-check-interval-secs", "0.2")
        super().__init__(folder, "moonlang.router", "--host", HOST, "--pd-disaggregation", *workers, *quick)

    def all_up(self) -> bool:
        found = self.http.get("/workers").json()["workers"]
        return len(found) == 2 and all(worker["is_healthy"] for worker in found)


def seconds_since(begin_ns: int) -> float:
    return (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S
