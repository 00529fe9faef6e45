"""What all stores share: tickets, one worker, deadlines, the manifest of every page, and a circuit breaker.

A backend is a blocking `PageStore` that knows texts and bytes; it may hang, fail or lie. The worker carries out one op
after the other. While one is overdue, and for a while after failures, new ops fail at once, so a store that is dead or
slow costs its callers nothing but misses; one op then tries whether it is back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.channels.pages import SUMS, Bytes, of_region, page_sum
from moonlang.channels.worker import WorkerChannel
from moonlang.core.kv import KvRegion
from moonlang.core.storage import Clear, Load, Probe, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.storage.manifest import HEADER_BYTES, Manifest

_log = log.get(__name__)

_MOST_QUEUED = 64  # ops; the brain has a handful under way
_CLOSE_S = 5.0


class PageStore(Protocol):
    """One backend. Called from one thread; every method may block, and raises PeerError when the store fails.

    An object is a header and a page under one name. Writing a name that exists is a success and changes nothing.
    """

    name: str

    def attach(self, pool: Bytes, headers: Bytes) -> None:
        """pool: [P, page bytes] where pages come from and go to. headers: [N, HEADER_BYTES], for up to N objects a
        call. Both stay where they are until `close`."""
        ...

    def leading(self, names: Sequence[str]) -> int:
        """How many of the first names are there."""
        ...

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        """Read objects into headers[0 .. n) and the pool's pages; how many of the first have arrived whole."""
        ...

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        """Write headers[0 .. n) and the pool's pages as objects; how many of the first are there now."""
        ...

    def clear(self, prefix: str) -> None:
        """Remove every object whose name begins so."""
        ...

    def close(self) -> None: ...


class Breaker:
    """Closed while the store answers. `most` failures in a row open it for a while that doubles up to a bound."""

    def __init__(self, *, most: int = 2, first_ns: int = NS_PER_S, longest_ns: int = 30 * NS_PER_S) -> None:
        self._most = most
        self._first_ns = first_ns
        self._longest_ns = longest_ns
        self._failures = 0
        self._pause_ns = first_ns
        self._until_ns = 0

    def allows(self, now_ns: int) -> bool:
        """False while it is open. When the pause is over one attempt passes, whose outcome decides."""
        if self._failures < self._most:
            return True
        if now_ns < self._until_ns:
            return False
        self._until_ns = now_ns + self._pause_ns
        return True

    def report(self, good: bool, now_ns: int) -> None:
        """Outcome of an attempt."""
        if good:
            self._failures = 0
            self._pause_ns = self._first_ns
            return
        self._failures += 1
        if self._failures >= self._most:
            self._until_ns = now_ns + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, self._longest_ns)


@dataclass(slots=True)
class StoreTotals:
    """For metrics; written by the worker, read by anybody. Latency is that of whole ops."""

    loaded_bytes: int = 0
    saved_bytes: int = 0
    ops: int = 0
    busy_ns: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # by cause


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """What a backend is told once.

    model: names the checkpoint in object names. host: the address of this process for others. extra:
    --hicache-storage-backend-extra-config. patience_ns: an op that takes longer makes later ones fail at once until it
    has ended.
    """

    model: str
    host: str = "127.0.0.1"
    extra: dict[str, object] = field(default_factory=dict)
    batch_pages: int = 64
    patience_ns: int = 2000 * NS_PER_MS


class StoreChannel(WorkerChannel[StoreOp]):
    """A KvStore around a PageStore. Owned by one thread."""

    def __init__(self, store: PageStore, options: StoreOptions, *, clock: Callable[[], int] = monotonic_ns) -> None:
        super().__init__(store.name, clock)
        self.totals = StoreTotals()
        self._store = store
        self._options = options
        self._breaker = Breaker()
        self._pages: _Pages

    def register(self, device: KvRegion) -> None:
        pool = of_region(device)
        headers = np.zeros((self._options.batch_pages, HEADER_BYTES), np.uint8)
        self._store.attach(pool, headers)
        self._pages = _Pages(pool, headers, device, self._options.model)

    def submit(self, op: StoreOp) -> Ticket:
        cause = self._why_not()
        if not cause:
            return super().submit(op)
        ticket = self._tickets.issue()
        self._count(cause)
        self._tickets.complete(Completion(ticket, Outcome.FAILED, error="The store does not answer in time."))
        return ticket

    def _why_not(self) -> str:
        """Why an op fails without being tried; empty when it is to be tried."""
        if self._running_ns > self._options.patience_ns:
            return "overdue"
        if self._queued >= _MOST_QUEUED:
            return "queue full"
        return "" if self._breaker.allows(self._clock()) else "paused"

    # ---- in the worker

    def _carry_out(self, ticket: Ticket, op: StoreOp) -> Completion:
        began_ns = self._clock()
        done = self._attempt(ticket, op, began_ns)
        now_ns = self._clock()
        self.totals.ops += 1
        self.totals.busy_ns += now_ns - began_ns
        in_time = now_ns - began_ns <= self._options.patience_ns
        self._breaker.report(done.outcome is Outcome.OK and in_time, now_ns)
        return done

    def _let_go(self) -> None:
        self._store.close()

    def _attempt(self, ticket: Ticket, op: StoreOp, now_ns: int) -> Completion:
        try:
            if isinstance(op, Load) and now_ns >= op.deadline_ns:
                self._count("late")
                return Completion(ticket, Outcome.CANCELLED, error="The request did not wait so long.")
            count, fault = self._do(op)
        except PeerError as error:
            self._count("error")
            _log.warning("The KV store failed: %s", error)
            return Completion(ticket, Outcome.FAILED, error=str(error))
        if fault:
            self._count("refused")
            _log.warning("A page from the KV store is not used: %s.", fault)
        moved = count * self._pages.page_bytes
        if isinstance(op, Load):
            self.totals.loaded_bytes += moved
        elif isinstance(op, Save):
            self.totals.saved_bytes += moved
        return Completion(ticket, Outcome.OK, count, moved if isinstance(op, Load | Save) else 0, fault)

    def _do(self, op: StoreOp) -> tuple[int, str]:
        """(leading pages that are good, why the next one is not)."""
        match op:
            case Probe():
                return self._store.leading(self._pages.names(op.keys)), ""
            case Load():
                return self._in_batches(op, self._load)
            case Save():
                return self._in_batches(op, self._save)
            case Clear():
                self._store.clear(self._pages.prefix)
                return 0, ""

    def _in_batches(
        self, op: Load | Save, move: Callable[[Sequence[bytes], Sequence[int]], tuple[int, str]]
    ) -> tuple[int, str]:
        step = self._options.batch_pages
        total = 0
        for at in range(0, len(op.keys), step):
            keys = op.keys[at : at + step]
            count, fault = move(keys, op.pages[at : at + step])
            total += count
            if count < len(keys):
                return total, fault
        return total, ""

    def _load(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, str]:
        count = self._store.read(self._pages.names(keys), pages)
        return self._pages.verify(keys[:count], pages[:count])

    def _save(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, str]:
        self._pages.describe(keys, pages)
        return self._store.write(self._pages.names(keys), pages), ""

    def _count(self, cause: str) -> None:
        self.totals.failures[cause] = self.totals.failures.get(cause, 0) + 1


class _Pages:
    """The pool's pages with their names and manifests."""

    def __init__(self, pool: Bytes, headers: Bytes, device: KvRegion, model: str) -> None:
        digest = device.schema.digest()
        self.page_bytes = device.schema.page_bytes
        self.prefix = f"{model.replace('/', '-')}_{digest[:16]}_"
        self._pool = pool
        self._headers = headers
        self._manifest = Manifest(digest, self.page_bytes, SUMS)

    def names(self, keys: Sequence[bytes]) -> list[str]:
        return [self.prefix + key.hex() for key in keys]

    def describe(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Write the headers of these pages."""
        for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
            header = self._manifest.header(key, page_sum(self._pool[page]))
            self._headers[i] = np.frombuffer(header, np.uint8)

    def verify(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, str]:
        """(how many of the first pages may be used, why the next may not)."""
        for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
            fault = self._manifest.fault(self._headers[i].tobytes(), key, page_sum(self._pool[page]))
            if fault:
                return i, fault
        return len(keys), ""
