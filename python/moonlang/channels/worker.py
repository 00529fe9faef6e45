"""A channel whose ops are carried out one after the other by one thread."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from moonlang.base.clock import monotonic_ns
from moonlang.channels.tickets import Tickets
from moonlang.core.ticket import Completion, Outcome, Ticket

Op = TypeVar("Op")

_CLOSE_S = 5.0  # how long `close` waits for the op under way


class WorkerChannel(ABC, Generic[Op]):
    """A Channel. The thread starts with the first op and may hang in one: nothing but that thread waits for it."""

    def __init__(self, kind: str, clock: Callable[[], int] = monotonic_ns) -> None:
        self._tickets = Tickets(kind)
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: deque[tuple[Ticket, Op]] = deque()
        self._ready = threading.Semaphore(0)
        self._began_ns: int | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._name = f"kv-{kind}"

    @abstractmethod
    def _carry_out(self, ticket: Ticket, op: Op) -> Completion:
        """Do it, in the worker. What it raises stops the worker and comes out of `poll`."""

    @abstractmethod
    def _let_go(self) -> None:
        """Free what the worker used; not called when it hangs."""

    def submit(self, op: Op) -> Ticket:
        ticket = self._tickets.issue()
        with self._lock:
            self._queue.append((ticket, op))
        self._ready.release()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return ticket

    def poll(self) -> Sequence[Completion]:
        done = self._tickets.take()
        if self._error is not None:
            raise self._error
        return done

    def cancel(self, ticket: Ticket) -> None:
        """Takes effect when the op has not begun."""
        with self._lock:
            item = next((item for item in self._queue if item[0] == ticket), None)
            if item is None:
                return
            self._queue.remove(item)
        self._tickets.complete(Completion(ticket, Outcome.CANCELLED, error="Cancelled."))

    def fileno(self) -> int:
        return self._tickets.fileno()

    def close(self) -> None:
        """Wait for the op under way, within reason; drop the others. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._ready.release()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        if self._thread is None or not self._thread.is_alive():
            self._let_go()
        self._tickets.close()

    def _fail_queued(self, error: str) -> int:
        """Fail every op that has not begun; how many there were."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
        for ticket, _ in dropped:
            self._tickets.complete(Completion(ticket, Outcome.FAILED, error=error))
        return len(dropped)

    @property
    def _queued(self) -> int:
        return len(self._queue)

    @property
    def _is_busy(self) -> bool:
        return bool(self._queue) or self._began_ns is not None

    @property
    def _running_ns(self) -> int:
        """How long the op under way has taken so far."""
        began_ns = self._began_ns
        return 0 if began_ns is None else self._clock() - began_ns

    def _work(self) -> None:
        while True:
            self._ready.acquire()
            with self._lock:
                if self._closing:
                    return
                if not self._queue:
                    continue  # it was cancelled, or failed
                ticket, op = self._queue.popleft()
                self._began_ns = self._clock()
            try:
                done = self._carry_out(ticket, op)
            except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
                self._error = error
                self._tickets.complete(Completion(ticket, Outcome.FAILED, error=str(error)))
                return
            self._began_ns = None
            self._tickets.complete(done)
