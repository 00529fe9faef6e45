"""HiCache's second tier: pages in host memory of this process, those of all ranks, each with the checksum it came with.

One thread copies, and takes the checksums on the way, without the interpreter's lock. A page that has changed while it
lay here is not given back.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from moonlang.base import log
from moonlang.channels.pages import Bytes, PagePool
from moonlang.channels.worker import WorkerChannel
from moonlang.core.kv import KvRegion
from moonlang.core.storage import Demote, HostOp, Promote
from moonlang.core.ticket import Completion, Outcome, Ticket

_log = log.get(__name__)


class HostMemory(WorkerChannel[HostOp]):
    """A HostPool of `num_slots` pages. Owned by one thread."""

    def __init__(self, num_slots: int) -> None:
        super().__init__("host")
        self._num_slots = num_slots
        self._sums = np.zeros(num_slots, np.uint64)
        self._device: PagePool
        self._slots: Bytes

    def register(self, regions: Sequence[KvRegion]) -> int:
        self._device = PagePool(regions)
        size = self._device.page_bytes
        # Mapped, not allocated: a slot takes no memory before it is used.
        memory = mmap.mmap(-1, max(1, self._num_slots * size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._slots = np.frombuffer(memory, np.uint8, self._num_slots * size).reshape(self._num_slots, size)
        return self._num_slots

    # ---- in the worker

    def _carry_out(self, ticket: Ticket, op: HostOp) -> Completion:
        count = self._demote(op) if isinstance(op, Demote) else self._promote(op)
        fault = "" if count == len(op.pages) else "A page in host memory has changed."
        if fault:
            _log.error("%s Its checksum does not hold; it is computed again.", fault)
        return Completion(ticket, Outcome.OK, count, count * self._device.page_bytes, fault)

    def _let_go(self) -> None:
        """The mapping goes with the last reference."""

    def _demote(self, op: Demote) -> int:
        self._sums[list(op.slots)] = self._device.copy_out(op.pages, self._places(op.slots))
        return len(op.pages)

    def _promote(self, op: Promote) -> int:
        found = self._device.copy_in(op.pages, self._places(op.slots))
        wrong = np.flatnonzero(found != self._sums[list(op.slots)])
        good = int(wrong[0]) if len(wrong) else len(op.pages)
        self._device.spread(op.pages[:good])
        return good

    def _places(self, slots: Sequence[int]) -> list[int]:
        """Addresses."""
        first, size = self._slots.ctypes.data, self._slots.shape[1]
        return [first + slot * size for slot in slots]
