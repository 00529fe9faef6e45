"""A channel whose ops are carried out by threads, one after the other in each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from moonlang.base.clock import monotonic_ns
from moonlang.channels.lane import Lane
from moonlang.channels.tickets import Tickets
from moonlang.core.ticket import Completion, Outcome, Ticket

Op = TypeVar("Op")

_CLOSE_S = 5.0  # how long `close` waits for the ops under way


class WorkerChannel(ABC, Generic[Op]):
    """A Channel over lanes; `_lane` says which one an op goes to."""

    def __init__(self, kind: str, clock: Callable[[], int] = monotonic_ns, lanes: Sequence[str] = ("",)) -> None:
        """lanes: their names."""
        self._tickets = Tickets(kind)
        self._clock = clock
        self._lanes: tuple[Lane[Op], ...] = tuple(
            Lane(f"kv-{kind}{name}", self._carry_out, self._tickets, clock) for name in lanes
        )
        self._closing = False

    @abstractmethod
    def _carry_out(self, ticket: Ticket, op: Op) -> Completion:
        """Do it, in its lane. What it raises ends the lane and comes out of `poll`."""

    @abstractmethod
    def _let_go(self) -> None:
        """Free what the lanes used; not called when one hangs."""

    def _lane(self, op: Op) -> Lane[Op]:
        return self._lanes[0]

    def submit(self, op: Op) -> Ticket:
        ticket = self._tickets.issue()
        self._lane(op).put(ticket, op)
        return ticket

    def poll(self) -> Sequence[Completion]:
        done = self._tickets.take()
        for lane in self._lanes:
            if lane.error is not None:
                raise lane.error
        return done

    def cancel(self, ticket: Ticket) -> None:
        """Takes effect when the op has not begun."""
        if any(lane.take_back(ticket) for lane in self._lanes):
            self._tickets.complete(Completion(ticket, Outcome.CANCELLED, error="Cancelled."))

    def fileno(self) -> int:
        return self._tickets.fileno()

    def close(self) -> None:
        """Wait for the ops under way, within reason; drop the others. May be called twice."""
        if self._closing:
            return
        self._closing = True
        ended = [lane.close(_CLOSE_S) for lane in self._lanes]
        if all(ended):
            self._let_go()
        self._tickets.close()
