"""The pool is what its schema and region say: pages are contiguous blocks [layer][k|v][head][token][dim]."""

from __future__ import annotations

import ctypes

import torch

from moonlang.core.kv import KvSchema
from moonlang.model_executor.allocator import keep_freed_memory
from moonlang.model_executor.kv_pool import KvPool

SCHEMA = KvSchema(num_layers=3, num_kv_heads=2, head_dim=4, page_size=5, dtype="float16", itemsize=2)


def test_views_and_region_are_the_same_memory() -> None:
    pool = KvPool(SCHEMA, 7)
    pool.value(1)[6, 1, 4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    region = pool.region()
    assert (region.num_pages, region.schema, region.stride) == (7, SCHEMA, SCHEMA.page_bytes)
    page = ctypes.string_at(region.address + 6 * region.stride, region.stride)
    offset = (((1 * 2 + 1) * 2 + 1) * 5 + 4) * 4 * 2  # layer 1, v, head 1, token 4, in bytes
    assert torch.frombuffer(bytearray(page[offset : offset + 8]), dtype=torch.float16).tolist() == [1, 2, 3, 4]
    assert page.count(0) == len(page) - 4
    assert pool.key(0).shape == (7, 2, 5, 4)


def test_freed_memory_is_kept_on_glibc() -> None:
    assert keep_freed_memory() is (hasattr(ctypes.CDLL(None), "mallopt"))
