"""Every test runs on every instruction set of this machine, from a seed of its own, with two kernel threads."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import sgl_kernel
import torch

_ALL = ("generic", "avx2", "avx512")
ISAS = _ALL[: _ALL.index(sgl_kernel.detected_isa()) + 1]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use."""
    sgl_kernel.force_isa(request.param)
    sgl_kernel.set_threads(2)
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    yield request.param
    sgl_kernel.force_isa(sgl_kernel.detected_isa())
