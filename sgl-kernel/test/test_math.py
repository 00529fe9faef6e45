"""The vector functions keep the accuracy that cpp/simd/vec.h claims, on every instruction set."""

import math

import pytest
import torch
from sgl_kernel import _C
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126
STEP = 1021  # of all float32, every so manieth: each binade in thousands of places


def every_binade(largest: float) -> Tensor:
    """Floats of both signs up to `largest`, evenly spread over their bit patterns, with an odd count."""
    top = int(torch.tensor(largest).view(torch.int32))
    positive = torch.arange(0, top, STEP, dtype=torch.int32).view(torch.float32)
    return torch.cat([-positive.flip(0), positive, torch.tensor([largest])])


def errors(got: Tensor, expected: Tensor) -> Tensor:
    """In units of the last place of float32 at the expected value; below the smallest normal number, of that one's."""
    _, exponent = torch.frexp(expected.abs().clamp_min(SMALLEST_NORMAL))
    return (got.double() - expected).abs() / 2.0 ** (exponent - 24).double()


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


# name: the function in float64, the largest |x| at which no result overflows or is flushed to 0, the claim
CASES = {
    "exp": (torch.exp, 86.9, 2),
    "sigmoid": (torch.sigmoid, 86.9, 3),
    "silu": (lambda x: x * torch.sigmoid(x), 86.9, 3),
    "tanh": (torch.tanh, 3.4e38, 3),
    "gelu_erf": (gelu_erf, 4.0, 24),
    "gelu_tanh": (gelu_tanh, 4.0, 24),
}


@pytest.mark.parametrize("name", CASES)
def test_within_the_claimed_units(name: str) -> None:
    function, largest, claim = CASES[name]
    x = every_binade(largest)
    y = torch.full_like(x, math.nan)
    getattr(_C.math, name)(x, y)
    wrong = errors(y, function(x.double()))
    worst = int(wrong.argmax())
    assert wrong[worst] <= claim, f"{name}({x[worst]}) = {y[worst]} is {wrong[worst]:.2f} ulp off"


SPECIAL = {  # of -inf, inf, NaN, 0, and values whose results leave the range of float32
    "exp": ([-math.inf, math.inf, math.nan, 0.0, 100.0, -100.0], [0.0, math.inf, math.nan, 1.0, math.inf, 0.0]),
    "sigmoid": ([-math.inf, math.inf, math.nan, 0.0, 100.0, -100.0], [0.0, 1.0, math.nan, 0.5, 1.0, 0.0]),
    "tanh": ([-math.inf, math.inf, math.nan, 0.0, 100.0, -100.0], [-1.0, 1.0, math.nan, 0.0, 1.0, -1.0]),
    "silu": ([math.inf, math.nan, 0.0, 100.0, -200.0], [math.inf, math.nan, 0.0, 100.0, 0.0]),
    "gelu_erf": ([math.inf, math.nan, 0.0, 100.0, -100.0], [math.inf, math.nan, 0.0, 100.0, 0.0]),
    "gelu_tanh": ([math.inf, math.nan, 0.0, 100.0, -100.0], [math.inf, math.nan, 0.0, 100.0, 0.0]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_ends_of_the_range(name: str) -> None:
    x, expected = (torch.tensor(values) for values in SPECIAL[name])
    y = torch.empty_like(x)
    getattr(_C.math, name)(x, y)
    assert torch.equal(torch.nan_to_num(y, nan=-7.0), torch.nan_to_num(expected, nan=-7.0)), y
