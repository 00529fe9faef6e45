"""The workers behind a router: who they are, whether they are up, and what they are doing for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from moonlang.base.errors import ConfigError
from moonlang.router.breaker import Breaker, BreakerLimits
from moonlang.router.prefix_index import PrefixIndex

Kind = Literal["regular", "prefill", "decode"]
KINDS: tuple[Kind, ...] = ("regular", "prefill", "decode")
MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthLimits:
    """How many checks in a row turn a worker from up to down and back."""

    failures: int
    successes: int


class Worker:
    """One server. It gets requests while it is up, not leaving, and its breaker lets them pass.

    bootstrap_port: of a prefill server; unless port_given, what it says of itself. name: what its cluster calls it.
    problem: why it cannot be used, "" when it can. heard_ns: when it last said anything.
    """

    def __init__(
        self,
        number: int,
        url: str,
        kind: Kind,
        bootstrap_port: int | None,
        health: HealthLimits,
        breaker: BreakerLimits,
        max_index_chars: int,
        name: str,
    ) -> None:
        self.id = str(number)
        self.name = name
        self.url = url
        self.kind: Kind = kind
        self.host = urlsplit(url).hostname or ""
        self.bootstrap_port = bootstrap_port
        self.port_given = bootstrap_port is not None
        self.facts: dict[str, str] = {}
        self.problem = ""
        self.up = False
        self.leaving = False
        self.heard_ns = 0
        self.index = PrefixIndex(max_index_chars)
        self.breaker = Breaker(breaker)
        self.selected_total = 0
        self.wanted = asyncio.Event()  # a check is wanted now
        self.idle = asyncio.Event()  # nothing is under way
        self.idle.set()
        self._health = health
        self._streak = 0  # checks in a row that say the opposite of `up`
        self._new = True
        self._cuts: dict[int, Callable[[], None]] = {}
        self._next_cut = 0

    @property
    def active(self) -> int:
        """Requests under way."""
        return len(self._cuts)

    def usable(self, now_ns: int) -> bool:
        """May it get a request?"""
        return self.up and not self.leaving and not self.problem and self.breaker.state(now_ns) != "open"

    def begin(self, cut: Callable[[], None]) -> int:
        """A request begins; `cut` ends it early. The number that `end` wants."""
        self._next_cut += 1
        self._cuts[self._next_cut] = cut
        self.idle.clear()
        return self._next_cut

    def end(self, number: int) -> None:
        """The request that `begin` numbered is over."""
        del self._cuts[number]
        if not self._cuts:
            self.idle.set()

    def checked(self, alive: bool) -> bool:
        """One health check; True when it changes what is known. A new worker is up after its first success."""
        if alive == self.up:
            self._streak = 0
            return False
        self._streak += 1
        enough = self._health.failures if self.up else 1 if self._new else self._health.successes
        if self._streak < enough:
            return False
        self._turn(alive)
        return True

    def lost(self) -> bool:
        """It refuses connections: down at once. True when that is news."""
        if self.up:
            self._turn(False)
            return True
        return False

    def _turn(self, up: bool) -> None:
        self.up = up
        self._new = False
        self._streak = 0
        if up:
            self.breaker.reset()
            return
        self.index.clear()
        for cut in list(self._cuts.values()):
            cut()


class WorkerSet:
    """The workers by id. pairs: prefill and decode servers, otherwise regular ones; the two do not mix."""

    def __init__(self, *, pairs: bool, health: HealthLimits, breaker: BreakerLimits, max_index_chars: int) -> None:
        self.pairs = pairs
        self._health = health
        self._breaker = breaker
        self._max_index_chars = max_index_chars
        self._workers: dict[str, Worker] = {}
        self._next = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What a request needs one of each of."""
        return ("prefill", "decode") if self.pairs else ("regular",)

    def add(self, url: str, kind: Kind, bootstrap_port: int | None = None, name: str = "") -> Worker:
        """A new worker, not yet up. ConfigError when it cannot be one."""
        url = checked_url(url)
        if kind not in self.kinds:
            raise ConfigError(f"This router has {' and '.join(self.kinds)} workers, {url} would be a {kind} one.")
        if any(worker.url == url and not worker.leaving for worker in self):
            raise ConfigError(f"There is a worker {url} already.")
        if bootstrap_port is not None and not 0 < bootstrap_port < 1 << 16:
            raise ConfigError(f"The bootstrap port of {url} must be in [1, 65535], got {bootstrap_port}.")
        if len(self) >= MAX_WORKERS:
            raise ConfigError(f"A router has at most {MAX_WORKERS} workers.")
        self._next += 1
        index_chars = self._max_index_chars
        worker = Worker(self._next, url, kind, bootstrap_port, self._health, self._breaker, index_chars, name)
        self._workers[worker.id] = worker
        return worker

    def find(self, name: str) -> Worker | None:
        """A worker by its id or its URL."""
        if name in self._workers:
            return self._workers[name]
        return next((worker for worker in self if worker.url == name.rstrip("/")), None)

    def discard(self, worker: Worker) -> None:
        """It is gone."""
        self._workers.pop(worker.id, None)

    def of(self, kind: Kind) -> list[Worker]:
        return [worker for worker in self if worker.kind == kind]

    def usable(self, kind: Kind, now_ns: int) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.kind == kind and worker.usable(now_ns)]

    def lacking(self, now_ns: int) -> str:
        """What is missing for a request to be served now; "" when nothing is."""
        kinds = [kind for kind in self.kinds if not self.usable(kind, now_ns)]
        if not kinds:
            return ""
        problems = [f"{worker.url}: {worker.problem}" for worker in self if worker.kind in kinds and worker.problem]
        return " ".join([f"No {' and no '.join(kinds)} worker is up.", *problems])


def checked_url(url: str) -> str:
    """http://host:port without a path; the scheme may be left out. ConfigError otherwise."""
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    hint = "Write it like http://10.0.0.1:30000."
    try:
        parts = urlsplit(full)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ConfigError(f"{url!r} is not the URL of a server: {error}.", hint=hint) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.path or parts.query:
        raise ConfigError(f"{url!r} is not the URL of a server.", hint=hint)
    return full
