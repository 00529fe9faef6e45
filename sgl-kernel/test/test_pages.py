"""Copies and checksums of pages."""

from __future__ import annotations

import numpy as np
import pytest
import sgl_kernel
import torch
from sgl_kernel.pages import copy_at, copy_pages, sum_at, sum_pages


@pytest.mark.parametrize("numbers", [1, 7, 8, 100, 70001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_copies_pages_and_sums_them(numbers: int, dtype: torch.dtype) -> None:
    source = torch.randint(-100, 100, (9, 1, numbers)).to(dtype)
    target = torch.full((12, 1, numbers), 3, dtype=dtype)
    source_ids = torch.randperm(9)[:6].int()
    target_ids = torch.randperm(12)[:6].int()
    expected = target.clone()
    expected[target_ids.long()] = source[source_ids.long()]
    sums, again = np.zeros(6, np.uint64), np.zeros(6, np.uint64)
    copy_pages(source, source_ids, target, target_ids, sums, seed=5)
    sum_pages(target, target_ids, again, seed=5)
    assert torch.equal(target, expected)
    assert [sgl_kernel.checksum(source[i], 5) for i in source_ids] == sums.tolist() == again.tolist()
    target.zero_()
    copy_pages(source, source_ids, target, target_ids)
    assert torch.equal(target[target_ids.long()], source[source_ids.long()])


def test_by_address() -> None:
    """Spans inside of pages: pages whose address is that of the span."""
    source, target = torch.randint(-100, 100, (5, 4000), dtype=torch.int8), torch.zeros(7, 5000, dtype=torch.int8)
    ids, places, sums = torch.tensor([4, 1]).int(), torch.tensor([0, 6]).int(), np.zeros(2, np.uint64)
    copy_at(source.data_ptr() + 100, 4000, ids, target.data_ptr() + 200, 5000, places, 3000, sums, seed=2)
    expected = torch.zeros_like(target)
    expected[[0, 6], 200:3200] = source[[4, 1], 100:3100]
    assert torch.equal(target, expected)
    again = np.zeros(2, np.uint64)
    sum_at(source.data_ptr() + 100, 4000, ids, 3000, again, seed=2)
    assert sums.tolist() == again.tolist()
    with pytest.raises(ValueError, match="overlap"):
        sum_at(source.data_ptr(), 100, ids, 3000, again)


def test_every_bit_counts() -> None:
    page = torch.randint(0, 256, (1, 1003), dtype=torch.uint8).to(torch.int8)
    sums, zero = np.zeros(1, np.uint64), torch.zeros(1, dtype=torch.int32)
    seen = set()
    for place in range(0, 1003, 17):
        for bit in range(8):
            page[0, place] ^= np.int8(np.uint8(1 << bit).view(np.int8))
            sum_pages(page, zero, sums)
            seen.add(int(sums[0]))
    assert len(seen) == 59 * 8


def test_refusals() -> None:
    pages, one = torch.zeros(4, 10), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="no such page"):
        copy_pages(pages, 4 * one, pages.clone(), one)
    with pytest.raises(ValueError, match="differ in size"):
        copy_pages(pages, one, torch.zeros(4, 11), one)
    with pytest.raises(ValueError, match="contiguous"):
        copy_pages(torch.zeros(4, 10, 2)[:, :, 0], one, pages, one)
