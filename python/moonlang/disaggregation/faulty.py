"""A seeded fault wrapper for any KvTransfer: tickets fail, or complete late, the same way on every run."""

from __future__ import annotations

import random
import select
from collections.abc import Sequence
from dataclasses import dataclass

from moonlang.base.wakeup import Wakeup
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, TransferOp
from moonlang.core.ports import KvTransfer
from moonlang.core.ticket import Completion, Outcome, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong with an op, as probabilities in [0, 1]; at most one fault hits an op.

    refuse: it fails and nothing was done. spoil: it is done, and its completion says that it failed. delay: its
    completion stays back for 1 to `delay_polls` further calls of `poll`.
    """

    seed: int
    refuse: float = 0.0
    spoil: float = 0.0
    delay: float = 0.0
    delay_polls: int = 4


@dataclass(slots=True)
class _Fate:
    ticket: Ticket
    spoilt: bool = False
    polls: int = 0  # to go before its completion is told


class FaultyTransfer:
    """Carries ops out by the inner transfer, except for the faults. Its tickets are its own."""

    def __init__(self, inner: KvTransfer, faults: Faults) -> None:
        self.refused = 0
        self.spoilt = 0
        self.delayed = 0
        self._inner = inner
        self._faults = faults
        self._random = random.Random(faults.seed)
        self._next = 0
        self._fates: dict[int, _Fate] = {}  # by id of the inner ticket
        self._inner_of: dict[int, Ticket] = {}  # by id of the own ticket
        self._held: list[tuple[_Fate, Completion]] = []
        self._own: list[Completion] = []
        self._waiting = Wakeup()
        self._epoll = select.epoll()
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._epoll.register(self._waiting.fileno(), select.EPOLLIN)
        self._closed = False

    def register(self, regions: Sequence[KvRegion], instance: str) -> KvCard:
        return self._inner.register(regions, instance)

    def submit(self, op: TransferOp) -> Ticket:
        ticket = Ticket(self._next, "faulty")
        self._next += 1
        draw, faults = self._random.random(), self._faults
        if draw < faults.refuse:
            self.refused += 1
            self._own.append(Completion(ticket, Outcome.FAILED, error="A planted fault: refused."))
            self._waiting.set()
            return ticket
        fate = _Fate(ticket)
        if draw < faults.refuse + faults.spoil:
            self.spoilt += 1
            fate.spoilt = True
        elif draw < faults.refuse + faults.spoil + faults.delay:
            self.delayed += 1
            fate.polls = self._random.randint(1, faults.delay_polls)
        inner = self._inner.submit(op)
        self._fates[inner.id] = fate
        self._inner_of[ticket.id] = inner
        return ticket

    def poll(self) -> Sequence[Completion]:
        """While a completion is held back, every call brings it one call nearer."""
        for fate, _ in self._held:
            fate.polls -= 1
        self._held += [(self._fates.pop(done.ticket.id), done) for done in self._inner.poll()]
        found = [_told(fate, done) for fate, done in self._held if fate.polls <= 0]
        self._held = [(fate, done) for fate, done in self._held if fate.polls > 0]
        for completion in found:
            del self._inner_of[completion.ticket.id]
        found += self._own
        self._own = []
        if self._held:
            self._waiting.set()
        else:
            self._waiting.clear()
        return sorted(found, key=lambda completion: completion.ticket.id)

    def cancel(self, ticket: Ticket) -> None:
        inner = self._inner_of.get(ticket.id)
        if inner is not None:
            self._inner.cancel(inner)

    def fileno(self) -> int:
        """Readable when a ticket may have completed, and as long as a completion is held back."""
        return self._epoll.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._epoll.close()
            self._waiting.close()
        self._inner.close()


def _told(fate: _Fate, done: Completion) -> Completion:
    if fate.spoilt and done.outcome is Outcome.OK:
        return Completion(fate.ticket, Outcome.FAILED, error="A planted fault: done, but told otherwise.")
    return Completion(fate.ticket, done.outcome, done.count, done.bytes, done.error, done.value)
