"""Copies and checksums of whole pages."""

from __future__ import annotations

from typing import Any

from sgl_kernel import _C


def copy_pages(source: Any, source_ids: Any, target: Any, target_ids: Any, sums: Any = None, seed: int = 0) -> None:
    """target[target_ids[i]] = source[source_ids[i]] for arrays [pages, ...] whose pages are contiguous and of one size.

    Ids: [n] int32. sums: [n] uint64, receives the checksum (`sgl_kernel.checksum`) of each page, in the same pass.
    """
    _C.copy_pages(source, source_ids, target, target_ids, sums, seed)


def sum_pages(source: Any, ids: Any, sums: Any, seed: int = 0) -> None:
    """sums[i] = checksum of page ids[i]. ids: [n] int32, sums: [n] uint64."""
    _C.sum_pages(source, ids, sums, seed)


def copy_at(
    source: int,
    source_stride: int,
    source_ids: Any,
    target: int,
    target_stride: int,
    target_ids: Any,
    bytes_each: int,
    sums: Any = None,
    seed: int = 0,
) -> None:
    """copy_pages between raw addresses: page i of `source` begins at source + i * source_stride (bytes).

    Of each page the first bytes_each bytes are copied; a span inside of pages is pages whose address is that of the
    span. Nothing checks that the memory is there.
    """
    _C.copy_at(source, source_stride, source_ids, target, target_stride, target_ids, bytes_each, sums, seed)


def sum_at(source: int, stride: int, ids: Any, bytes_each: int, sums: Any, seed: int = 0) -> None:
    """sum_pages of raw addresses, see copy_at."""
    _C.sum_at(source, stride, ids, bytes_each, sums, seed)
