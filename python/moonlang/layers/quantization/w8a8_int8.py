"""int8 weights, one scale per output channel, and int8 activations, one scale per token chosen as they come.

Inputs that ranks share have one scale per token and segment (see `layers.linear.RowLinear`): so no rank has to know
what the others have, and their number changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moonlang.config.quantization import Quantization
from moonlang.distributed.group import Group, tree_sum
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization import fp8, int8
from moonlang.layers.quantization.scheme import Scheme

_LARGEST = 127.0


def read(tensors: Mapping[str, Tensor], settings: Quantization) -> QuantizedMatrix:
    """See Scheme.read. -128, which these kernels have no room for, becomes -127: no known tool writes it."""
    matrix = int8.read(tensors, settings)
    if matrix.scales.shape[1] != 1:
        raise ValueError("its scales are not one per output channel")
    return dataclasses.replace(matrix, kind="w8a8", codes=matrix.codes.clamp(min=-127))


def make(weight: Tensor) -> QuantizedMatrix:
    """As in int8.py."""
    return dataclasses.replace(int8.make(weight), kind="w8a8")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K] -> codes [T, K], whole numbers in [-127, 127] as float32, and scales [T, 1]: x is codes * scales."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    # A quotient, as in the kernels: a number over a tensor would be its reciprocal times the number.
    inverse = torch.where(largest > 0, torch.full_like(largest, _LARGEST) / largest, torch.zeros_like(largest))
    return (x * inverse).round_(), largest / _LARGEST


class Int8Linear(nn.Module):
    """y = x W^T + b with both factors in int8 and exact sums; the reference of the kernels, not quick.

    segments: see `layers.linear.Linear`. group: those who have the rest of the inputs; None when nobody has.
    """

    group: Group | None = None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, segments: int = 1) -> None:
        super().__init__()
        self._segments = matrix.segments(segments)
        self.weight = nn.Parameter(matrix.codes, requires_grad=False)
        self.scales = nn.Parameter(matrix.scales.T.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        parts = zip(x.chunk(self._segments, 1), self.weight.chunk(self._segments, 1), strict=True)
        y = tree_sum(torch.stack([self._product(*part) for part in parts]))
        if self.group is not None:
            y = self.group.all_reduce(y)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """One segment."""
        codes, scales = quantize_rows(x)
        sums = codes.double() @ weight.T.double()  # whole numbers below 2^53: no order of summation matters
        return sums.float() * (scales * self.scales)


class RowInt8Linear(Int8Linear):
    """An Int8Linear in the place of a RowLinear whose inputs ranks share."""


BACKEND = Scheme(
    beside=("weight_scale",), ignored=("input_scale", "output_scale"), read=read, shape=fp8.shape, make=make
)
