"""A pool as an array of bytes, and the checksum of a page."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from moonlang.base.checksum import Checksum
from moonlang.base.errors import BugError
from moonlang.core.kv import KvRegion

SUMS = "xxh3-64"  # how page checksums are computed

Bytes = NDArray[np.uint8]


def of_region(region: KvRegion) -> Bytes:
    """[P, page bytes]: the pool's own memory, not a copy. It must outlive the array."""
    if region.stride != region.schema.page_bytes:
        raise BugError(f"Pages lie {region.stride} bytes apart and have {region.schema.page_bytes}.")
    size = region.num_pages * region.stride
    memory = (ctypes.c_uint8 * size).from_address(region.address)
    return np.ctypeslib.as_array(memory).reshape(region.num_pages, region.stride)


def page_sum(page: Bytes) -> int:
    """Checksum of one page [page bytes], in [0, 2**64)."""
    found = Checksum()
    found.add_memory(page.ctypes.data, page.nbytes)
    return found.value()
