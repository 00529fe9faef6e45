"""Pools as arrays of bytes: copies and checksums of spans of pages, with the CPU kernels where they are installed.

A checksum of a push covers the spans one after the other, and within a span the pages in the order given. Both sides
must compute it the same way: `METHOD` names how, and instances compare it when they connect.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moonlang.config.host import cpu_kernels
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import Span

Bytes = NDArray[np.uint8]

METHOD = "kernel" if cpu_kernels() else "crc32"


def of_region(region: KvRegion) -> Bytes:
    """[P, page bytes]: the pool's own memory, not a copy. It must outlive the array."""
    if region.stride != region.schema.page_bytes:
        raise ValueError(f"pages lie {region.stride} bytes apart and have {region.schema.page_bytes}")
    size = region.num_pages * region.stride
    memory = (ctypes.c_uint8 * size).from_address(region.address)
    return np.frombuffer(memory, np.uint8).reshape(region.num_pages, region.stride)


def copy(
    source: Bytes,
    source_pages: Sequence[int],
    target: Bytes,
    target_pages: Sequence[int],
    span: Span,
    sums: NDArray[np.uint64] | None,
) -> None:
    """Copy `span` of every source page to its target page; `sums` [n] receives a checksum per page, None: not wanted.

    Without the interpreter's lock where the kernels are installed.
    """
    from_part = source[:, span.source : span.source + span.size]
    to_part = target[:, span.target : span.target + span.size]
    if METHOD == "kernel":
        from sgl_kernel import copy_pages

        copy_pages(from_part, _ids(source_pages), to_part, _ids(target_pages), sums)
        return
    to_part[list(target_pages)] = from_part[list(source_pages)]
    if sums is not None:
        sums[:] = [zlib.crc32(from_part[page]) for page in source_pages]


def sum_span(pool: Bytes, pages: Sequence[int], offset: int, size: int, sums: NDArray[np.uint64]) -> None:
    """`sums` [n] receives the checksum of bytes [offset, offset + size) of each page."""
    part = pool[:, offset : offset + size]
    if METHOD == "kernel":
        from sgl_kernel import sum_pages

        sum_pages(part, _ids(pages), sums)
    else:
        sums[:] = [zlib.crc32(part[page]) for page in pages]


def total(sums: NDArray[np.uint64]) -> int:
    """One number, below 2^63, for the checksums of a push, [spans, pages]."""
    return zlib.crc32(sums) | (int(np.bitwise_xor.reduce(sums, axis=None)) & 0x7FFF_FFFF) << 32


def sum_pages_by(pool: Bytes, pages: Sequence[int], spans: Sequence[Span], *, at_target: bool) -> int:
    """The checksum of `spans` of `pages`: by their target side, as landed, or by their source side, as sent."""
    sums = np.zeros((len(spans), len(pages)), np.uint64)
    for row, span in zip(sums, spans, strict=True):
        sum_span(pool, pages, span.target if at_target else span.source, span.size, row)
    return total(sums)


def _ids(pages: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(pages, np.int32)
