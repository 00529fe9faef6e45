"""The memory that this process contributes to the store, made ready before it is used.

The library maps it with small pages and leaves it untouched. A KV page that is put there then waits for the kernel to
clear memory, 4 KB at a time, which takes several times as long as the copy: 1.4 GB/s instead of 8.4, of time that the
model computes in. So it gets huge pages, and a thread of the lowest priority touches it from its beginning to its end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from moonlang.base import host_memory, log

LOWEST: Final = 19  # priority: the highest number is the lowest
SPARED_BYTES: Final = 1 << 30  # of the machine's free memory are left alone: then the rest is touched when it is used
_CHUNK_BYTES: Final = 16 << 20
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_MAPS = Path("/proc/self/maps")

_log = log.get(__name__)


def stand_back() -> None:
    """Let the calling thread have what nobody else wants of the processors. It should hold the interpreter's lock for
    next to nothing, so that nobody waits for a thread that does not get its turn."""
    with suppress(OSError):  # a sandbox without priorities
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


Range = tuple[int, int]  # addresses: the first, and the one after the last


def mapped() -> list[Range]:
    """The memory without a file that this process can write to now, in the order of addresses."""
    lines = (line.split() for line in _MAPS.read_text().splitlines()) if _MAPS.exists() else ()
    return [_range(words[0]) for words in lines if len(words) == 5 and words[1].startswith("rw")]


def come(before: Sequence[Range], now: Sequence[Range]) -> Iterator[Range]:
    """What is in `now` and was not in `before`; the kernel makes one mapping of two that touch each other."""
    for start, end in now:
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            if start < old_start:
                yield start, old_start
            start = old_end
        if start < end:
            yield start, end


def _range(text: str) -> Range:
    start, end = text.split("-")
    return int(start, 16), int(end, 16)


class Segment:
    """Stretches of at least `size` bytes that have come since `before` was taken; none when that is 0. Close it before
    they are given back."""

    def __init__(self, before: Sequence[Range], size: int) -> None:
        self._stop = threading.Event()
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        found = come(before, mapped()) if size else ()
        self._places = [(start, end - start) for start, end in found if end - start >= size]
        self._thread = threading.Thread(target=self._touch, name="kv-store-touch", daemon=True)
        for start, length in self._places:
            self._madvise(start, length, mmap.MADV_HUGEPAGE)
        if self._places:
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._places:
            self._thread.join()

    def _touch(self) -> None:
        stand_back()
        for start, length in self._places:
            for at in range(start, start + length, _CHUNK_BYTES):
                if self._stop.is_set():
                    return
                if host_memory.free_bytes() < SPARED_BYTES:
                    _log.warning("The store's segment is not touched in advance: memory is short.")
                    return
                if self._madvise(at, min(_CHUNK_BYTES, start + length - at), _POPULATE_WRITE):
                    return  # an older kernel
