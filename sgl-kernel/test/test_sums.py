"""XXH3-64 while copying: the sums of the reference implementation, on every instruction set and for every cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import sgl_kernel
import xxhash
from sgl_kernel.sums import move_parts

ISAS = ["generic", "avx2", "avx512"]
CUTS = [[256], [320], [1024], [1088], [64, 192], [1024, 1024], [2048], [128, 64, 4096, 64], [64] * 20, [100_032]]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if ISAS.index(request.param) > ISAS.index(sgl_kernel.detected_isa()):
        pytest.skip(f"this machine has no {request.param}")
    before = sgl_kernel.isa()
    sgl_kernel.force_isa(request.param)
    yield request.param
    sgl_kernel.force_isa(before)


def parts_of(source: np.ndarray, target: np.ndarray | None, cut: Sequence[int]) -> np.ndarray:
    """[pages, parts, 3] of pages that lie one after the other. source, target: [pages, bytes]."""
    starts = np.concatenate([[0], np.cumsum(cut)[:-1]])
    pages = np.arange(len(source))[:, None] * source.shape[1] + starts
    to = np.zeros_like(pages) if target is None else target.ctypes.data + pages
    return np.stack([source.ctypes.data + pages, to, np.broadcast_to(cut, pages.shape)], 2).astype(np.uint64)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("shift", [0, 8])
def test_copies_and_sums(cut: list[int], shift: int) -> None:
    size = sum(cut)
    source = np.random.default_rng(1).integers(0, 256, (3, size), np.uint8)
    memory = np.zeros(3 * size + 128, np.uint8)
    aligned = -memory.ctypes.data % 64
    target = memory[aligned + shift :][: 3 * size].reshape(3, size)  # at a multiple of 64, and not
    sums, again = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    move_parts(parts_of(source, target, cut), sums)
    np.testing.assert_array_equal(target, source)
    assert not memory[: aligned + shift].any()
    assert not memory[aligned + shift + 3 * size :].any()
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(page.tobytes()) for page in source]
    move_parts(parts_of(source, None, cut), again)
    assert again.tolist() == sums.tolist()


def test_refusals() -> None:
    page, sums = np.zeros((1, 1024), np.uint8), np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="multiple of 64"):
        move_parts(parts_of(page, None, [1000]), sums)
    with pytest.raises(ValueError, match="at least"):
        move_parts(parts_of(page, None, [192]), sums)
    with pytest.raises(ValueError, match="one per page"):
        move_parts(parts_of(page, None, [1024]), np.zeros(2, np.uint64))
