"""Keeping freed memory: what a forward frees, the next one needs again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30
_MMAP_BYTES = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> bool:
    """Let the C library of this process keep up to a gigabyte of freed memory instead of giving it back at once.

    By default glibc maps every large tensor anew, and the kernel then clears it page by page on first touch: for the
    temporaries of a decode step that costs several times the arithmetic. Returns False where the C library has no such
    setting (musl, macOS), which is slower and nothing else.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
