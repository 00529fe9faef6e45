"""Host pool and store of one server in virtual time, with everything that can go wrong.

An op reads what it copies at the last moment, and fills what it writes with rubbish at the first: whoever gives up a
page too early, or reads one too soon, gets wrong tokens. What a lying store brings has been found out by the adapter:
it ends the count, as a page does that is not there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from moonlang.core.storage import Demote, HostOp, Load, Probe, Promote, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.mem_cache.tiers import Tiers
from moonlang.sim.checkers.isolation import Isolation
from moonlang.sim.tiers.memory import RUBBISH, Content, SharedStore, TierCells
from moonlang.sim.violation import Violation

_KIND = "sim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """Times in nanoseconds; the others are probabilities per op."""

    host_ns: int = 100_000
    store_ns: int = 2_000_000
    down: int = 1  # on the way down an op takes so many times as long
    jitter: float = 1.0  # an op takes up to so much longer, as a share
    hang: float = 0.0  # the store takes hang_ns, and fails then
    hang_ns: int = 3_000_000_000
    fail: float = 0.0  # the store fails
    lie: float = 0.0  # a page from the store is not what it should be
    decay: float = 0.0  # a page in host memory has changed
    forget: float = 0.0  # the store loses everything


@dataclass(slots=True)
class _UnderWay:
    number: int
    op: HostOp | StoreOp
    end_ns: int
    fails: bool


class SimChannels:
    """One worker for the host and two for the store, up and down, as the real channels have: an op begins when the one
    before has ended."""

    def __init__(
        self,
        cells: TierCells,
        slots: int,
        store: SharedStore,
        weather: Weather,
        rng: random.Random,
        isolation: Isolation | None,
    ) -> None:
        """isolation: is told under which keys pages were computed that come up."""
        self._cells = cells
        self._isolation = isolation
        self._slots: list[Content] = [Content(RUBBISH, "")] * slots
        self._store = store
        self._weather = weather
        self._rng = rng
        self._host_ops: list[_UnderWay] = []
        self._up_ops: list[_UnderWay] = []
        self._down_ops: list[_UnderWay] = []

    @property
    def next_ns(self) -> int | None:
        return min((ops[0].end_ns for ops in self._queues if ops), default=None)

    @property
    def _queues(self) -> tuple[list[_UnderWay], ...]:
        return self._host_ops, self._up_ops, self._down_ops

    def submit(self, number: int, op: HostOp | StoreOp, now_ns: int) -> None:
        weather, rng = self._weather, self._rng
        is_host = isinstance(op, Demote | Promote)
        usual_ns = weather.host_ns if is_host else weather.store_ns
        queue = self._host_ops if is_host else self._up_ops if isinstance(op, Probe | Load) else self._down_ops
        if isinstance(op, Demote | Save):
            usual_ns *= weather.down
        taken_ns = int(usual_ns * (1 + weather.jitter * rng.random()))
        fails = not is_host and rng.random() < weather.fail
        if not is_host and rng.random() < weather.hang:
            taken_ns, fails = weather.hang_ns, True
        begin_ns = max(now_ns, queue[-1].end_ns) if queue else now_ns
        if isinstance(op, Promote | Load):
            for page in op.pages:
                self._cells.fill(page, RUBBISH)
        queue.append(_UnderWay(number, op, begin_ns + taken_ns, fails))

    def deliver(self, tiers: Tiers, now_ns: int) -> None:
        """End what has had its time."""
        for queue in self._queues:
            while queue and queue[0].end_ns <= now_ns:
                done = queue.pop(0)
                ticket = Ticket(done.number, _KIND)
                end = Completion(ticket, Outcome.FAILED, error="a fault") if done.fails else self._end(ticket, done.op)
                tiers.completed(done.number, done.op, end, now_ns)

    def _end(self, ticket: Ticket, op: HostOp | StoreOp) -> Completion:
        if self._rng.random() < self._weather.forget:
            self._store.lose_all()
        match op:
            case Demote():
                for page, slot in zip(op.pages, op.slots, strict=True):
                    self._slots[slot] = self._whole(page)
                count = len(op.pages)
            case Promote():
                count = self._cut(len(op.pages), self._weather.decay)
                for page, slot in zip(op.pages[:count], op.slots, strict=False):
                    self._fill(page, self._slots[slot])
            case Probe():
                count = next((i for i, key in enumerate(op.keys) if self._store.get(key) is None), len(op.keys))
            case Load():
                count = self._load(op)
            case Save():
                count = self._cut(len(op.pages), self._weather.lie)  # the store is full
                for key, page in zip(op.keys[:count], op.pages, strict=False):
                    self._store.put(key, self._whole(page))
            case _:
                raise Violation("tiers", f"nobody asks for {op}")
        return Completion(ticket, Outcome.OK, count)

    def _load(self, op: Load) -> int:
        honest = self._cut(len(op.keys), self._weather.lie)
        for i, (key, page) in enumerate(zip(op.keys, op.pages, strict=True)):
            content = self._store.get(key)
            if content is None or i == honest:
                self._store.remove(key)
                return i
            self._fill(page, content)
        return len(op.keys)

    def _fill(self, page: int, content: Content) -> None:
        self._cells.fill(page, content.sums)
        if self._isolation is not None:
            self._isolation.arrived(page, content.extra_key)

    def _whole(self, page: int) -> Content:
        sums = self._cells.sums(page)
        if len(sums) != self._cells.page_size or sums == RUBBISH:
            raise Violation("tiers", f"page {page} goes down with {len(sums)} of {self._cells.page_size} cells")
        return Content(sums, self._isolation.key_of(page) if self._isolation is not None else "")

    def _cut(self, count: int, share: float) -> int:
        """`count`, or fewer with this probability."""
        return self._rng.randrange(count) if count and self._rng.random() < share else count
