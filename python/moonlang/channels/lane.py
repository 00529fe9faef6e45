"""One thread that carries out ops one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from moonlang.channels.tickets import Tickets
from moonlang.core.ticket import Completion, Outcome, Ticket

Op = TypeVar("Op")


class Lane(Generic[Op]):
    """The thread starts with the first op and may hang in one: nothing but that thread waits for it.

    error: what the thread has died of.
    """

    def __init__(
        self,
        name: str,
        carry_out: Callable[[Ticket, Op], Completion],
        tickets: Tickets,
        clock: Callable[[], int],
    ) -> None:
        """carry_out: does an op, in the thread; what it raises ends the thread. clock: nanoseconds."""
        self.error: BaseException | None = None
        self._name = name
        self._carry_out = carry_out
        self._tickets = tickets
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: deque[tuple[Ticket, Op]] = deque()
        self._ready = threading.Semaphore(0)
        self._began_ns: int | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, ticket: Ticket, op: Op) -> None:
        with self._lock:
            self._queue.append((ticket, op))
        self._ready.release()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def take_back(self, ticket: Ticket) -> bool:
        """Whether the op was here and had not begun; it never will then."""
        with self._lock:
            item = next((item for item in self._queue if item[0] == ticket), None)
            if item is not None:
                self._queue.remove(item)
            return item is not None

    def fail_queued(self, error: str) -> int:
        """Fail every op that has not begun; how many there were."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
        for ticket, _ in dropped:
            self._tickets.complete(Completion(ticket, Outcome.FAILED, error=error))
        return len(dropped)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def is_busy(self) -> bool:
        return bool(self._queue) or self._began_ns is not None

    @property
    def running_ns(self) -> int:
        """How long the op under way has taken so far."""
        began_ns = self._began_ns
        return 0 if began_ns is None else self._clock() - began_ns

    def close(self, patience_s: float) -> bool:
        """Wait so long for the op under way, and drop the others. Whether the thread has ended."""
        self._closing = True
        self._ready.release()
        if self._thread is not None:
            self._thread.join(patience_s)
        return self._thread is None or not self._thread.is_alive()

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
                self.error = error
                self._tickets.complete(Completion(ticket, Outcome.FAILED, error=str(error)))
                return
            self._began_ns = None
            self._tickets.complete(done)
