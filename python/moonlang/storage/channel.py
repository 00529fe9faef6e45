"""What all stores share: tickets, one worker, deadlines, the manifest of every page, and a circuit breaker.

A backend is a blocking `PageStore` that knows texts and bytes; it may hang, fail or lie. One thread looks up and reads,
another writes, each one op after the other: nobody who wants pages waits for those that are being stored. While an op
is overdue, and for a while after failures, the others of its thread fail at once, so a store that is dead, slow, full
or lying costs its callers nothing but misses; one op then tries whether it is back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moonlang.base.checksum import METHOD
from moonlang.base.clock import NS_PER_MS, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.channels.lane import Lane
from moonlang.channels.moves import Sums
from moonlang.channels.pages import Bytes, PagePool
from moonlang.channels.worker import WorkerChannel
from moonlang.core.kv import KvRegion
from moonlang.core.storage import Clear, Load, Probe, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.storage.breaker import Breaker
from moonlang.storage.manifest import HEADER_BYTES, Fault, Manifest, shards
from moonlang.storage.totals import Ledger, StoreTotals

_MOST_QUEUED = 64  # ops; the brain has a handful under way
_SAVE_PATIENCE = 5  # times as long: nobody waits for what is being stored, and on a busy machine it stands back
_AWAY = "The store does not answer in time."


class StoreFullError(PeerError):
    """The store has no room for more pages at the moment."""


class Headers(NamedTuple):
    """Where the headers of objects are, [N, HEADER_BYTES] each: up to N objects are read or written in a call.

    A store that copies pages itself may take their checksums on the way, of the bytes that it writes into the pools:
    then sums[i] is that of the page of object i, and summed[i] True. The others are summed where they lie.
    """

    read: Bytes
    written: Bytes
    sums: Sums
    summed: NDArray[np.bool_]

    @classmethod
    def of(cls, objects: int) -> Headers:
        read, written = (np.zeros((objects, HEADER_BYTES), np.uint8) for _ in range(2))
        return cls(read, written, np.zeros(objects, np.uint64), np.zeros(objects, np.bool_))


class PageStore(Protocol):
    """One backend. `leading`, `read` and `discard` are called from one thread, `write` and `clear` from another. Every
    method may block, and raises PeerError when the store fails, of the kind StoreFullError when there is no room for
    more pages.

    An object is a header and a page under one name. Writing a name that exists is a success and changes nothing.
    """

    name: str

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        """pools: where pages come from and go to, one array [P, piece bytes] per piece; row p of each, one after the
        other, is page p. All stays where it is until `close`."""
        ...

    def leading(self, names: Sequence[str]) -> int:
        """How many of the first names are there."""
        ...

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        """Read objects into headers.read[0 .. n) and these pages; how many of the first have arrived whole."""
        ...

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        """Write headers.written[0 .. n) and these pages as objects; how many of the first are there now."""
        ...

    def discard(self, names: Sequence[str]) -> None:
        """Remove these objects, which are damaged."""
        ...

    def clear(self, prefix: str) -> None:
        """Remove every object whose name begins so."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """What a backend is told once.

    model: names the checkpoint in object names. host: the address of this process for others. extra:
    --hicache-storage-backend-extra-config. patience_ns: a look-up or a load that takes longer makes later ones fail at
    once until it has ended; what is being stored may take some times as long.
    """

    model: str
    host: str = "127.0.0.1"
    extra: dict[str, object] = field(default_factory=dict)
    batch_pages: int = 64
    patience_ns: int = 2000 * NS_PER_MS


class StoreChannel(WorkerChannel[StoreOp]):
    """A KvStore around a PageStore. Owned by one thread, which polls at least every `patience_ns` while ops are under
    way: then those are failed that wait behind one that hangs."""

    _lanes: tuple[Lane[StoreOp], Lane[StoreOp]]

    def __init__(self, store: PageStore, options: StoreOptions, *, clock: Callable[[], int] = monotonic_ns) -> None:
        super().__init__(f"store-{store.name}", clock, lanes=("-up", "-down"))
        self._ledger = Ledger(store.name, clock)
        self._store = store
        self._options = options
        self._breakers: dict[type[StoreOp], Breaker] = {kind: Breaker() for kind in (Probe, Load, Save, Clear)}
        self._pages: _Pages

    @property
    def totals(self) -> StoreTotals:
        """A snapshot."""
        return self._ledger.snapshot()

    def register(self, regions: Sequence[KvRegion]) -> None:
        pool = PagePool(regions)
        headers = Headers.of(self._options.batch_pages)
        self._store.attach(pool.pieces, headers)
        self._pages = _Pages(pool, headers, self._options.model)

    def submit(self, op: StoreOp) -> Ticket:
        cause = self._why_not(op)
        if not cause:
            return super().submit(op)
        ticket = self._tickets.issue()
        self._ledger.failed(cause)
        self._tickets.complete(Completion(ticket, Outcome.FAILED, error=_AWAY))
        return ticket

    def poll(self) -> Sequence[Completion]:
        for lane in self._lanes:
            if self._is_overdue(lane):
                self._give_up_queued(lane, "overdue")
        return super().poll()

    def _lane(self, op: StoreOp) -> Lane[StoreOp]:
        up, down = self._lanes
        return up if isinstance(op, Probe | Load) else down

    def _why_not(self, op: StoreOp) -> str:
        """Why an op fails without being tried; empty when it is to be tried."""
        lane = self._lane(op)
        if self._is_overdue(lane):
            self._ledger.complain("overdue", f"An operation has taken {lane.running_ns // NS_PER_MS} ms so far.")
            return "overdue"
        if lane.queued >= _MOST_QUEUED:
            return "queue full"
        now_ns = self._clock()
        # A store whose pages are late or wrong is not asked for them; a Load follows a Probe that was let through.
        kinds = {Probe: (Probe, Load), Load: (), Save: (Save,), Clear: ()}[type(op)]
        open_ones = [self._breakers[kind] for kind in kinds if not self._breakers[kind].is_closed]
        if open_ones and (lane.is_busy or any(breaker.is_paused(now_ns) for breaker in open_ones)):
            return "paused"
        for breaker in open_ones:
            breaker.attempt(now_ns)
        return ""

    def _is_overdue(self, lane: Lane[StoreOp]) -> bool:
        return lane.running_ns > self._patience_ns(lane)

    def _patience_ns(self, lane: Lane[StoreOp]) -> int:
        return self._options.patience_ns * (_SAVE_PATIENCE if lane is self._lanes[-1] else 1)

    def _give_up_queued(self, lane: Lane[StoreOp], cause: str) -> None:
        count = lane.fail_queued(_AWAY)
        if count:
            self._ledger.failed(cause, count)

    # ---- in the lanes

    def _carry_out(self, ticket: Ticket, op: StoreOp) -> Completion:
        began_ns = self._clock()
        if isinstance(op, Load) and began_ns >= op.deadline_ns:
            self._ledger.failed("late")
            return Completion(ticket, Outcome.CANCELLED, error="The request did not wait so long.")
        done, good = self._attempt(ticket, op)
        now_ns = self._clock()
        self._ledger.carried_out(now_ns - began_ns)
        if now_ns - began_ns > self._patience_ns(self._lane(op)):
            self._ledger.complain("slow", f"A {type(op).__name__} took {(now_ns - began_ns) // NS_PER_MS} ms.")
            good = False
        self._report(op, good, now_ns)
        return done

    def _report(self, op: StoreOp, good: bool, now_ns: int) -> None:
        breaker = self._breakers[type(op)]
        if not breaker.report(good, now_ns):
            return
        if breaker.is_closed:
            self._ledger.recovered(f"It is used again: a {type(op).__name__} has succeeded.")
        else:
            self._give_up_queued(self._lane(op), "paused")

    def _let_go(self) -> None:
        self._store.close()

    def _attempt(self, ticket: Ticket, op: StoreOp) -> tuple[Completion, bool]:
        """(completion, whether the store did what it should)."""
        try:
            count, fault = self._do(op)
        except StoreFullError as error:
            self._ledger.complain("full", str(error))
            return Completion(ticket, Outcome.FAILED, error=str(error)), False
        except Exception as error:  # noqa: BLE001 - libraries and classes of users raise anything; all of it is a miss
            self._ledger.complain("error", str(error) or type(error).__name__)
            return Completion(ticket, Outcome.FAILED, error=str(error)), False
        if fault is not None:
            self._ledger.complain(fault.name.lower(), f"A page is not used: {fault}.")
        moved = count * self._pages.page_bytes
        if isinstance(op, Load):
            self._ledger.moved(loaded=moved)
        elif isinstance(op, Save):
            self._ledger.moved(saved=moved)
        bytes_moved = moved if isinstance(op, Load | Save) else 0
        return Completion(ticket, Outcome.OK, count, bytes_moved, str(fault or "")), fault is None

    def _do(self, op: StoreOp) -> tuple[int, Fault | None]:
        """(leading pages that are good, why the next one is not)."""
        match op:
            case Probe():
                return self._store.leading(self._pages.names(op.keys)), None
            case Load():
                return self._in_batches(op, self._load)
            case Save():
                return self._in_batches(op, self._save)
            case Clear():
                self._store.clear(self._pages.prefix)
                return 0, None

    def _in_batches(
        self, op: Load | Save, move: Callable[[Sequence[bytes], Sequence[int]], tuple[int, Fault | None]]
    ) -> tuple[int, Fault | None]:
        step = self._options.batch_pages
        total = 0
        for at in range(0, len(op.keys), step):
            keys = op.keys[at : at + step]
            count, fault = move(keys, op.pages[at : at + step])
            total += count
            if count < len(keys):
                return total, fault
        return total, None

    def _load(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, Fault | None]:
        self._pages.headers.summed[:] = False
        count = self._store.read(self._pages.names(keys), pages)
        good, fault = self._pages.verify(keys[:count], pages[:count])
        if fault is not None:  # objects are never replaced: the page computed instead can only enter when it is gone
            self._store.discard(self._pages.names(keys[good : good + 1]))
        return good, fault

    def _save(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, Fault | None]:
        self._pages.describe(keys, pages)
        return self._store.write(self._pages.names(keys), pages), None


class _Pages:
    """The pool's pages with their names and manifests."""

    def __init__(self, pool: PagePool, headers: Headers, model: str) -> None:
        digest = pool.schema.digest()
        self.page_bytes = pool.page_bytes
        self.prefix = f"{model.replace('/', '-')}_{digest[:16]}_"
        self._pool = pool
        self.headers = headers
        self._manifest = Manifest(digest, self.page_bytes, METHOD, pool.cuts)

    def names(self, keys: Sequence[bytes]) -> list[str]:
        return [self.prefix + key.hex() for key in keys]

    def describe(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Write the headers of these pages."""
        for i, (key, checksum) in enumerate(zip(keys, self._pool.sums(pages).tolist(), strict=True)):
            header = self._manifest.header(key, checksum)
            self.headers.written[i] = np.frombuffer(header, np.uint8)

    def verify(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, Fault | None]:
        """(how many of the first pages may be used, why the next may not). Those lie as all ranks need them now."""
        good, fault = 0, None
        checksums = self._checksums(pages)
        for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
            header = self.headers.read[i].tobytes()
            fault = self._manifest.fault(header, key, checksums[i])
            if fault is None and not self._pool.can_take(shards(header)):
                fault = Fault.SCHEMA
            if fault is not None:
                break
            self._pool.recut(page, shards(header))
            good += 1
        self._pool.spread(pages[:good])
        return good, fault

    def _checksums(self, pages: Sequence[int]) -> list[int]:
        """Of pages that have been read."""
        sums = self.headers.sums[: len(pages)]
        unsummed: list[int] = np.flatnonzero(~self.headers.summed[: len(pages)]).tolist()
        if unsummed:
            sums[unsummed] = self._pool.sums([pages[i] for i in unsummed])
        return sums.tolist()
