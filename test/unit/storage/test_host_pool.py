"""The host tier: bytes come back as they went, and a page that has changed does not come back."""

from __future__ import annotations

import select

import numpy as np
import pytest

from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.storage import Demote, HostOp, Promote
from moonlang.core.ticket import Completion
from moonlang.storage.host_pool import HostMemory

SCHEMA = KvSchema(num_layers=2, num_kv_heads=1, head_dim=8, page_size=16, dtype="bfloat16", itemsize=2)


@pytest.fixture
def device() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (16, SCHEMA.page_bytes), np.uint8)


def region(device: np.ndarray) -> KvRegion:
    return KvRegion(address=device.ctypes.data, stride=SCHEMA.page_bytes, num_pages=len(device), schema=SCHEMA)


def do(pool: HostMemory, op: HostOp) -> Completion:
    pool.submit(op)
    assert select.select([pool.fileno()], [], [], 10)[0]
    (done,) = pool.poll()
    return done


def test_pages_come_back_as_they_went(device: np.ndarray) -> None:
    pool = HostMemory(8)
    assert pool.register([region(device)]) == 8
    content = device[[3, 1, 2]].copy()
    assert do(pool, Demote(pages=(3, 1, 2), slots=(7, 0, 4))).bytes == 3 * SCHEMA.page_bytes
    device[:] = 0
    assert do(pool, Promote(slots=(7, 0, 4), pages=(10, 11, 12))).count == 3
    np.testing.assert_array_equal(device[10:13], content)
    pool.close()


def test_a_page_that_has_changed_does_not_count(device: np.ndarray) -> None:
    pool = HostMemory(4)
    pool.register([region(device)])
    do(pool, Demote(pages=(1, 2, 3), slots=(0, 1, 2)))
    pool._slots[1, 5] ^= 1
    done = do(pool, Promote(slots=(0, 1, 2), pages=(4, 5, 6)))
    assert done.count == 1
    assert "changed" in done.error
    pool.close()
