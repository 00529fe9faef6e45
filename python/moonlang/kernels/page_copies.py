"""Copies and checksums of pages by address: those of `sgl_kernel`, or the same in numpy where it is not installed.

Both compute the same checksum, so an instance with kernels and one without agree on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moonlang.config.host import cpu_kernels

Sums = npt.NDArray[np.uint64]

_MIX, _SPREAD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_MASK = (1 << 64) - 1
_BLOCK = 8192  # bytes
_STEP = 32  # bytes: four lanes of eight


class Pages(NamedTuple):
    """Pages in memory: number i begins at address + i * stride (bytes). Nothing checks that the memory is there."""

    address: int
    stride: int
    ids: Sequence[int]


class PageCopies(Protocol):
    """`size` bytes of each page count. No page may be written twice, or written and read, in one call."""

    def copy(self, source: Pages, target: Pages, size: int) -> None:
        """Page source.ids[i] goes to page target.ids[i]."""
        ...

    def copy_and_sum(self, source: Pages, target: Pages, size: int) -> Sums:
        """The same, and the checksum of each page, [n], taken on the way."""
        ...

    def sums(self, source: Pages, size: int) -> Sums:
        """The checksums alone: [n]."""
        ...


class KernelCopies:
    """See PageCopies. On the kernels' threads, at the speed of memory."""

    def copy(self, source: Pages, target: Pages, size: int) -> None:
        self._copy(source, target, size, None)

    def copy_and_sum(self, source: Pages, target: Pages, size: int) -> Sums:
        sums = np.empty(len(source.ids), np.uint64)
        self._copy(source, target, size, sums)
        return sums

    def sums(self, source: Pages, size: int) -> Sums:
        from sgl_kernel.pages import sum_at

        sums = np.empty(len(source.ids), np.uint64)
        sum_at(source.address, source.stride, np.asarray(source.ids, np.int32), size, sums)
        return sums

    @staticmethod
    def _copy(source: Pages, target: Pages, size: int, sums: Sums | None) -> None:
        from sgl_kernel.pages import copy_at

        here, there = np.asarray(source.ids, np.int32), np.asarray(target.ids, np.int32)
        copy_at(source.address, source.stride, here, target.address, target.stride, there, size, sums)


class NumpyCopies:
    """See PageCopies. The reference: one thread."""

    def copy(self, source: Pages, target: Pages, size: int) -> None:
        for here, there in zip(source.ids, target.ids, strict=True):
            ctypes.memmove(target.address + there * target.stride, source.address + here * source.stride, size)

    def copy_and_sum(self, source: Pages, target: Pages, size: int) -> Sums:
        self.copy(source, target, size)
        return self.sums(target, size)

    def sums(self, source: Pages, size: int) -> Sums:
        pages = (_bytes_at(source.address + i * source.stride, size) for i in source.ids)
        return np.array([_checksum(page) for page in pages], np.uint64)


def page_copies() -> PageCopies:
    """The faster one of what is there."""
    return KernelCopies() if cpu_kernels() else NumpyCopies()


def _bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _avalanche(h: int) -> int:
    h = (h ^ h >> 32) * _SPREAD & _MASK
    h = (h ^ h >> 29) * _MIX & _MASK
    return h ^ h >> 32


def _checksum(page: npt.NDArray[np.uint8]) -> int:
    """What sgl-kernel/cpp/base/checksum.h computes with seed 0."""
    whole = len(page) // _BLOCK * _BLOCK
    h = _avalanche(len(page))
    for block in _block_sums(page[:whole].reshape(-1, _BLOCK)):
        h = _avalanche(h ^ block)
    if whole < len(page):
        h = _avalanche(h ^ _block_sums(page[whole:].reshape(1, -1))[0])
    return h


def _block_sums(blocks: npt.NDArray[np.uint8]) -> list[int]:
    """blocks: [n, size]. All blocks advance together, four lanes each."""
    count, size = blocks.shape
    steps = size // _STEP
    words = np.frombuffer(np.ascontiguousarray(blocks[:, : steps * _STEP]), np.uint64).reshape(count, steps, 4)
    lanes = np.tile(np.array([_MIX, _SPREAD, ~_MIX & _MASK, -_SPREAD & _MASK], np.uint64), (count, 1))
    mix, left, right = np.uint64(_MIX), np.uint64(29), np.uint64(35)
    for step in range(steps):
        lanes = (lanes ^ words[:, step]) * mix
        lanes = (lanes << left) | (lanes >> right)
    rest = np.zeros((count, _STEP), np.uint8)
    rest[:, : size - steps * _STEP] = blocks[:, steps * _STEP :]
    lanes ^= rest.view(np.uint64) * mix
    return [_of_lanes(row, size) for row in lanes.tolist()]


def _of_lanes(lanes: Sequence[int], size: int) -> int:
    h = size * _SPREAD & _MASK
    for i, lane in enumerate(lanes):
        h = _avalanche(h ^ _avalanche(lane)) + i & _MASK
    return h
