"""HiCache's second tier: pages in host memory of this process, each with the checksum it came with.

One thread copies, a batch at a time, without the interpreter's lock where the CPU kernels are installed. The checksum is
taken in the same pass: a page that has changed while it lay here is not given back.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from moonlang.base import log
from moonlang.base.wakeup import Wakeup
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import Span
from moonlang.core.storage import Demote, HostOp, Promote
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.disaggregation import page_memory
from moonlang.disaggregation.page_memory import Bytes

_log = log.get(__name__)

_CLOSE_S = 5.0


class HostMemory:
    """A HostPool of `num_slots` pages. Owned by one thread."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._queue: deque[tuple[Ticket, HostOp]] = deque()
        self._ready = threading.Semaphore(0)
        self._done: deque[Completion] = deque()
        self._wakeup = Wakeup()
        self._closing = False
        self._next = 0
        self._sums = np.zeros(num_slots, np.uint64)
        self._device: Bytes
        self._slots: Bytes
        self._whole: Span
        self._worker: threading.Thread | None = None

    def register(self, device: KvRegion) -> int:
        self._device = page_memory.of_region(device)
        size = device.schema.page_bytes
        self._whole = Span(0, 0, size)
        # Mapped, not allocated: a slot takes no memory before it is used.
        memory = mmap.mmap(-1, max(1, self._num_slots * size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._slots = np.frombuffer(memory, np.uint8, self._num_slots * size).reshape(self._num_slots, size)
        self._worker = threading.Thread(target=self._work, name="kv-host", daemon=True)
        self._worker.start()
        return self._num_slots

    def submit(self, op: HostOp) -> Ticket:
        ticket = Ticket(self._next, "host")
        self._next += 1
        with self._lock:
            self._queue.append((ticket, op))
        self._ready.release()
        return ticket

    def poll(self) -> Sequence[Completion]:
        with self._lock:
            self._wakeup.clear()
            found = list(self._done)
            self._done.clear()
        return found

    def cancel(self, ticket: Ticket) -> None:
        with self._lock:
            for item in self._queue:
                if item[0] == ticket:
                    self._queue.remove(item)
                    self._done.append(Completion(ticket, Outcome.CANCELLED, error="Cancelled."))
                    self._wakeup.set()
                    return

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def close(self) -> None:
        """Wait for the copy under way. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._ready.release()
        if self._worker is not None:
            self._worker.join(_CLOSE_S)
        self._wakeup.close()

    # ---- in the worker

    def _work(self) -> None:
        while True:
            self._ready.acquire()
            with self._lock:
                if self._closing:
                    return
                if not self._queue:
                    continue  # it was cancelled
                ticket, op = self._queue.popleft()
            count = self._demote(op) if isinstance(op, Demote) else self._promote(op)
            fault = "" if count == len(op.pages) else "A page in host memory has changed."
            if fault:
                _log.error("%s Its checksum does not hold; it is computed again.", fault)
            size = count * self._whole.size
            with self._lock:
                self._done.append(Completion(ticket, Outcome.OK, count, size, fault))
                self._wakeup.set()

    def _demote(self, op: Demote) -> int:
        sums = np.zeros(len(op.pages), np.uint64)
        page_memory.copy(self._device, op.pages, self._slots, op.slots, self._whole, sums)
        self._sums[list(op.slots)] = sums
        return len(op.pages)

    def _promote(self, op: Promote) -> int:
        sums = np.zeros(len(op.pages), np.uint64)
        page_memory.copy(self._slots, op.slots, self._device, op.pages, self._whole, sums)
        wrong = np.flatnonzero(self._sums[list(op.slots)] != sums)
        return int(wrong[0]) if wrong.size else len(op.pages)
