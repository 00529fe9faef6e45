"""Norms, gated activations and the embedding: against float64, and rounding as the torch layers do it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sgl_kernel import rowops
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 129), (300, 1024), (1, 5120)]
EPS = 1e-6
ACTS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
}


def strided(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random rows with poison between them, at an address aligned to the element only."""
    whole = torch.full((rows * (dim + 3) + 1,), math.nan, dtype=dtype)
    view = whole[1:].view(rows, dim + 3)[:, :dim]
    view.copy_(torch.randn(rows, dim) * 2)
    return view


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, ulps: float = 1.0) -> None:
    """expected: float64. Within `ulps` units in the last place of dtype, of the value or of the smallest normal one."""
    unit = torch.finfo(dtype).eps
    floor = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-4}[dtype]
    wrong = (got.double() - expected).abs() > ulps * unit * expected.abs() + floor
    assert not wrong.any(), (got[wrong][:5], expected[wrong][:5])


def normalised(x: Tensor, weight: Tensor, gemma: bool) -> Tensor:
    """In float64, rounded to x's type where the layer rounds."""
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    return exact * weight.double() if gemma else exact.to(x.dtype).double() * weight.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, gemma: bool) -> None:
    x, y = strided(*shape, dtype), strided(*shape, dtype).fill_(math.nan)
    weight = torch.randn(shape[1]).to(torch.float32 if gemma else dtype)
    rowops.rms_norm(x, weight, EPS, y=y, gemma=gemma)
    close(y, normalised(x, weight, gemma), dtype, 2.5 if dtype == torch.float32 else 1.6)
    rowops.rms_norm(x, weight, EPS, y=x, gemma=gemma)
    assert torch.equal(x, y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_before_the_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, y = (strided(*shape, dtype) for _ in range(3))
    weight, total, alone = torch.randn(shape[1]).to(dtype), x + residual, torch.empty(shape, dtype=dtype)
    rowops.rms_norm(x, weight, EPS, y=y, residual=residual)
    assert torch.equal(residual, total)
    rowops.rms_norm(total, weight, EPS, y=alone)
    assert torch.equal(y, alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_after_the_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, norm = strided(*shape, dtype), strided(*shape, dtype), torch.empty(shape, dtype=dtype)
    weight = torch.randn(shape[1])
    rowops.rms_norm(x, weight, EPS, y=norm, gemma=True)
    expected = residual + norm
    rowops.rms_norm(x, weight, EPS, residual=residual, gemma=True)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_gated(shape: tuple[int, int], dtype: torch.dtype, act: str) -> None:
    x, y = strided(shape[0], 2 * shape[1], dtype), strided(*shape, dtype).fill_(math.nan)
    rowops.gated(x, y, act)
    gate, up = x.double().chunk(2, -1)
    close(y, ACTS[act](gate) * up, dtype, 8 if dtype == torch.float32 else 0.6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 7.75])
def test_embedding(dtype: torch.dtype, scale: float) -> None:
    table, ids = strided(50, 37, dtype), torch.randint(50, (400,))
    y = torch.full((400, 37), math.nan, dtype=dtype)
    rowops.embedding(ids, table, y, scale)
    assert torch.equal(y, table[ids] * torch.tensor(scale, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_alone(dtype: torch.dtype) -> None:
    x, weight = strided(700, 333, dtype), torch.randn(333).to(dtype)
    together, alone = torch.empty(700, 333, dtype=dtype), torch.empty(700, 333, dtype=dtype)
    rowops.rms_norm(x, weight, EPS, y=together)
    for i in range(0, 700, 13):
        rowops.rms_norm(x[i : i + 13], weight, EPS, y=alone[i : i + 13])
    assert torch.equal(together, alone)


def test_what_does_not_fit_is_refused() -> None:
    x, y = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="weight: expected 1 dimension of 8"):
        rowops.rms_norm(x, torch.ones(7), EPS, y=y)
    with pytest.raises(ValueError, match="one element type"):
        rowops.rms_norm(x, torch.ones(8), EPS, y=y.half())
    with pytest.raises(ValueError, match="give y, residual or both"):
        rowops.rms_norm(x, torch.ones(8), EPS)
    with pytest.raises(ValueError, match="twice the columns"):
        rowops.gated(x, y, "silu")
    with pytest.raises(ValueError, match="'swish'"):
        rowops.gated(torch.zeros(2, 16), y, "swish")
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="outside the table"):
            rowops.embedding(torch.tensor([0, wrong]), x, y)
