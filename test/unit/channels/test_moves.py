"""Copies with checksums: the same with kernels and without, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from moonlang.base import checksum
from moonlang.channels import moves


@pytest.mark.parametrize("sizes", [(512, 1024), (100, 33), (64, 64), (4096,)], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_pages_go_out_and_come_back(sizes: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(moves, "_kernels", None)
    rng = np.random.default_rng(1)
    pools = [rng.integers(0, 256, (6, size), np.uint8) for size in sizes]
    places = [(pool.ctypes.data, pool.shape[1]) for pool in pools]
    outside = np.zeros((3, sum(sizes)), np.uint8)
    addresses = [row.ctypes.data for row in outside]
    pages, back = [4, 0, 2], [1, 3, 5]
    out = moves.move(moves.page_parts(places, pages, addresses, out=True))
    np.testing.assert_array_equal(outside, np.concatenate([pool[pages] for pool in pools], 1))
    assert out.tolist() == [checksum.of_memory([(row.ctypes.data, row.nbytes)]) for row in outside]
    came = moves.move(moves.page_parts(places, back, addresses, out=False))
    assert came.tolist() == out.tolist()
    for pool in pools:
        np.testing.assert_array_equal(pool[back], pool[pages])
    assert moves.move(moves.page_parts(places, back, None, out=True)).tolist() == out.tolist()


def test_no_pages_have_no_sums() -> None:
    assert not len(moves.move(moves.page_parts([(0, 64)], [], None, out=True)))
