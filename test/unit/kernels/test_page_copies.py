"""Copies and checksums by address: numpy and the kernels do the same."""

from __future__ import annotations

import numpy as np
import pytest

from moonlang.config.host import cpu_kernels
from moonlang.kernels.page_copies import KernelCopies, NumpyCopies, PageCopies, Pages, page_copies

_BACKENDS: list[PageCopies] = [NumpyCopies(), *([KernelCopies()] if cpu_kernels() else [])]
_STRIDE = 40_000


def _memory(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, _STRIDE), np.uint8)


def _pages(memory: np.ndarray, ids: list[int]) -> Pages:
    return Pages(memory.ctypes.data, _STRIDE, ids)


@pytest.mark.parametrize("copies", _BACKENDS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("size", [1, 31, 32, 8192, 8193, 16384, 39_999])
def test_copies_what_was_named_and_nothing_else(copies: PageCopies, size: int) -> None:
    source, target = _memory(1), _memory(2)
    expected = target.copy()
    expected[[0, 3], :size] = source[[5, 2], :size]
    sums = copies.copy_and_sum(_pages(source, [5, 2]), _pages(target, [0, 3]), size)
    assert np.array_equal(target, expected)
    assert sums.tolist() == copies.sums(_pages(target, [0, 3]), size).tolist()
    copies.copy(_pages(source, [1]), _pages(target, [1]), size)
    assert np.array_equal(target[1, :size], source[1, :size])


@pytest.mark.skipif(len(_BACKENDS) < 2, reason="sgl-kernel is not installed")
@pytest.mark.parametrize("size", [0, 1, 8, 33, 8191, 8192, 8200, 24_577, 40_000])
def test_both_compute_one_checksum(size: int) -> None:
    memory = _memory(3)
    pages = _pages(memory, [4, 0, 5])
    assert KernelCopies().sums(pages, size).tolist() == NumpyCopies().sums(pages, size).tolist()


def test_the_checksum_sees_every_bit_and_the_order_of_blocks() -> None:
    memory = _memory(4)
    pages = _pages(memory, [0])
    seen = {int(NumpyCopies().sums(pages, 20_000)[0])}
    for bit in range(0, 160_000, 19_997):
        memory[0, bit // 8] ^= 1 << bit % 8
        seen.add(int(NumpyCopies().sums(pages, 20_000)[0]))
        memory[0, bit // 8] ^= 1 << bit % 8
    memory[0, :16_384] = np.roll(memory[0, :16_384], 8192)
    seen.add(int(NumpyCopies().sums(pages, 20_000)[0]))
    assert len(seen) == 11


def test_the_kernels_are_taken_where_they_are() -> None:
    assert isinstance(page_copies(), KernelCopies if cpu_kernels() else NumpyCopies)
