"""Checksums of memory that is copied, in one pass where the kernels are there.

A sum that is taken while bytes are copied is that of the bytes that were written: nothing has to be read again, and
that is what checksums cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moonlang.base.checksum import Checksum

Parts = NDArray[np.uint64]  # [pages, parts, 3]: address, address that it is copied to (0: nowhere), bytes
Sums = NDArray[np.uint64]  # [pages]

try:
    from sgl_kernel import sums as _kernels
except ImportError:  # nobody has compiled them here: in two passes then, with the same sums
    _kernels = None


def move(parts: Parts) -> Sums:
    """Copy the parts of every page; the checksums of the pages (`base.checksum`), of their parts one after the other.

    The memory must be there. The interpreter is free meanwhile.
    """
    sums = np.empty(len(parts), np.uint64)
    if len(parts) and _kernels is not None and _fits(parts[:, :, 2], _kernels.STRIPE_BYTES, _kernels.LEAST_BYTES):
        _kernels.move_parts(parts, sums)
        return sums
    for i, page in enumerate(parts.tolist()):
        found = Checksum()
        for source, target, size in page:
            if target:
                ctypes.memmove(target, source, size)
            found.add_memory(target or source, size)
        sums[i] = found.value()
    return sums


def _fits(sizes: Sums, stripe: int, least: int) -> bool:
    """Whether the kernel can take parts of these sizes, [pages, parts]."""
    return not (sizes % np.uint64(stripe)).any() and sizes.sum(1).min() >= least


def page_parts(
    places: Sequence[tuple[int, int]], pages: Sequence[int], addresses: Sequence[int] | None, *, out: bool
) -> Parts:
    """Of pages whose pieces lie in several pools, and of memory in which those lie one after the other.

    places: address and bytes per page of each pool. addresses: where each page lies, or goes when `out`; None: nowhere.
    """
    parts = np.zeros((len(pages), len(places), 3), np.uint64)
    here, there = (0, 1) if out else (1, 0)
    numbers, at = np.asarray(pages, np.uint64), 0
    for k, (base, size) in enumerate(places):
        parts[:, k, here] = np.uint64(base) + numbers * np.uint64(size)
        parts[:, k, 2] = size
        if addresses is not None:
            parts[:, k, there] = np.asarray(addresses, np.uint64) + np.uint64(at)
        at += size
    return parts
