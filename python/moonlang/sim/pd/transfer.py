"""Pages on their way between the pools of two servers, slice by slice, and how that can fail."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moonlang.base.clock import NS_PER_MS
from moonlang.core.pairing import KvCard, Push, TransferOp, Verify
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.sim.pd.cells import Content, SharedCells, checksum
from moonlang.sim.pd.network import SimLink
from moonlang.sim.pd.process import Process

KIND = "transfer"

_STALL_NS = 5 * NS_PER_MS  # how often a push that does not get through looks again


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSpec:
    """slice_ns: of one slice; slice_pages: pages in it. Shares of ops: failed at some slice, delayed (by up to
    delay_ns), corrupt (a part lands altered, and nobody says so). one_sided: writes need no help of the target's
    process, as with RDMA or mapped memory."""

    slice_ns: int
    slice_pages: int
    failed: float = 0.0
    delayed: float = 0.0
    delay_ns: int = 0
    corrupt: float = 0.0
    one_sided: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """The pool of another server: `cells` to write into, the process behind it."""

    cells: SharedCells
    process: Process


@dataclass(slots=True)
class _Work:
    """A push. slices: pairs (source page, target page) of each; read: contents in the order of the pages."""

    ticket: Ticket
    op: Push
    slices: list[list[tuple[int, int]]]
    fail_at: int | None
    corrupt_at: int | None
    done: int = 0
    cancelled: bool = False
    flying: list[tuple[int, int, int, Content]] = field(default_factory=list)  # (page, part, origin, content)
    read: list[Content] = field(default_factory=list)


class SimTransfer:
    """`KvTransfer` of one server. find: the pool behind a card, None when its process has ended. written: called for
    each page that is written, with (card of the target, room, page)."""

    def __init__(
        self,
        process: Process,
        link: SimLink,
        cells: SharedCells,
        spec: TransferSpec,
        rng: random.Random,
        *,
        find: Callable[[KvCard], Target | None],
        written: Callable[[KvCard, int, int], None],
        wake: Callable[[], None],
    ) -> None:
        self._process = process
        self._link = link
        self._cells = cells
        self._spec = spec
        self._rng = rng
        self._find = find
        self._written = written
        self._wake = wake
        self._next_id = 0
        self._lanes: dict[str, deque[_Work]] = {}  # by peer; the first one is under way
        self._done: list[Completion] = []

    @property
    def in_flight(self) -> int:
        """Pushes that have not completed."""
        return sum(len(lane) for lane in self._lanes.values())

    def submit(self, op: TransferOp) -> Ticket:
        ticket = Ticket(self._next_id, KIND)
        self._next_id += 1
        delay_ns = 0
        if self._rng.random() < self._spec.delayed:
            delay_ns = self._rng.randrange(self._spec.delay_ns)
        if isinstance(op, Verify):
            self._process.after(self._spec.slice_ns + delay_ns, lambda: self._verify(ticket, op))
        else:
            lane = self._lanes.setdefault(op.peer.instance, deque())
            lane.append(self._work(ticket, op))
            if len(lane) == 1:
                self._process.after(delay_ns, lambda: self._next_slice(lane))
        return ticket

    def poll(self) -> list[Completion]:
        done, self._done = self._done, []
        return sorted(done, key=lambda completion: completion.ticket.id)

    def cancel(self, ticket: Ticket) -> None:
        for lane in self._lanes.values():
            for work in lane:
                if work.ticket == ticket:
                    work.cancelled = True

    def die(self) -> None:
        """The process is killed: what is on the wire may still arrive."""
        for lane in self._lanes.values():
            if lane and lane[0].flying and self._rng.random() < 0.5:
                self._write(lane[0])

    # ---- inside

    def _work(self, ticket: Ticket, op: Push) -> _Work:
        pairs = list(zip(op.source, op.target, strict=True))
        size, spec, rng = self._spec.slice_pages, self._spec, self._rng
        slices = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        fail_at = rng.randint(0, len(slices)) if rng.random() < spec.failed else None
        corrupt_at = rng.randrange(len(slices)) if slices and rng.random() < spec.corrupt else None
        return _Work(ticket, op, slices, fail_at, corrupt_at)

    def _next_slice(self, lane: deque[_Work]) -> None:
        """Look whether to go on, and read one slice: what is altered later does not travel."""
        work = lane[0]
        if work.cancelled:
            self._complete(lane, Outcome.CANCELLED, "cancelled")
        elif self._process.now_ns >= work.op.deadline_ns:
            self._complete(lane, Outcome.FAILED, "The deadline of the push has passed.")
        elif work.done == work.fail_at:
            self._complete(lane, Outcome.FAILED, "The transfer engine reports a failure.")
        elif work.done == len(work.slices):
            self._complete(lane, Outcome.OK, "")
        elif not self._link.is_up(work.op.peer.instance):
            self._complete(lane, Outcome.FAILED, "The peer is out of reach.")
        else:
            self._read(work)
            self._process.after(self._spec.slice_ns, lambda: self._land(lane))

    def _read(self, work: _Work) -> None:
        target = self._find(work.op.peer)
        if target is None:
            return  # nothing flies: `_land` says so
        for source, page in work.slices[work.done]:
            for span in work.op.spans:
                origins = self._cells.parts(work.op.source_rank, span.source, span.size)
                parts = target.cells.parts(work.op.target_rank, span.target, span.size)
                for origin, part in zip(origins, parts, strict=True):
                    content = self._cells.snapshot(source, origin)
                    work.read.append(content)
                    work.flying.append((page, part, origin, content))
        if work.done == work.corrupt_at:
            page, part, origin, content = work.flying[-1]
            work.flying[-1] = (page, part, origin, (*content[:-1], -1))

    def _land(self, lane: deque[_Work]) -> None:
        work = lane[0]
        target = self._find(work.op.peer)
        if target is None:
            self._complete(lane, Outcome.FAILED, "The peer has closed the connection.")
            return
        stuck = self._link.stalls(work.op.peer.instance) or (target.process.stopped and not self._spec.one_sided)
        if not stuck:
            self._write(work)
            work.done += 1
            self._next_slice(lane)
        elif self._process.now_ns >= work.op.deadline_ns or not self._link.is_up(work.op.peer.instance):
            # The engine closes the connection: what was under way does not arrive any more.
            self._complete(lane, Outcome.FAILED, "The peer takes nothing.")
        else:
            self._process.after(_STALL_NS, lambda: self._land(lane))

    def _write(self, work: _Work) -> None:
        target = self._find(work.op.peer)
        if target is not None:
            for page, part, origin, content in work.flying:
                target.cells.land(page, part, origin, content)
            for _, page in work.slices[work.done]:
                self._written(work.op.peer, work.op.room, page)
        work.flying.clear()

    def _complete(self, lane: deque[_Work], outcome: Outcome, error: str) -> None:
        work = lane.popleft()
        work.flying.clear()
        value = checksum(work.read) if outcome is Outcome.OK else 0
        pages = sum(len(pairs) for pairs in work.slices[: work.done])
        size = pages * sum(span.size for span in work.op.spans)
        self._finish(Completion(work.ticket, outcome, pages, size, error, value))
        if lane:
            self._process.after(0, lambda: self._next_slice(lane))

    def _verify(self, ticket: Ticket, op: Verify) -> None:
        contents = [
            self._cells.snapshot(page, part)
            for page in op.pages
            for span in op.spans
            for part in self._cells.parts(op.rank, span.target, span.size)
        ]
        if self._rng.random() < self._spec.failed / 4:
            self._finish(Completion(ticket, Outcome.FAILED, error="The page cannot be read."))
        else:
            self._finish(Completion(ticket, Outcome.OK, count=len(op.pages), value=checksum(contents)))

    def _finish(self, completion: Completion) -> None:
        self._done.append(completion)
        self._wake()
