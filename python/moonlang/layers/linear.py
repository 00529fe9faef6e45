"""Matrix multiplications."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value

_MIN_ROWS = 4


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [T, in], weight: [out, in] -> x W^T + b: [T, out].

    A token's result should not depend on how many others are in the batch. The CPU libraries keep to that (on the
    machines tried), except that float32 products of fewer than four rows take another path: those are padded.
    """
    if len(x) < _MIN_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        return F.linear(F.pad(x, (0, 0, 0, _MIN_ROWS - len(x))), weight, bias)[: len(x)]
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x W^T + b. weight: [out, in], uninitialised until a loader fills it.

    Projections that read the same input are one Linear whose weight is the concatenation of theirs along `out`
    (q, k, v; gate, up): one call instead of three. The weights map of the model says which tensors go where.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        return project(x, self.weight, self.bias)

    def lower(self, build: Builder, x: Value, *, residual: Value | None = None, act: str | None = None) -> Value:
        """The same as kernel calls. act: the weight is a gate above an up; act(gate) * up comes out."""
        weight = build.matrix(self.weight, gated=act is not None)
        bias = None if self.bias is None else build.vector(self.bias)
        return build.linear(x, weight, bias=bias, residual=residual, act=act)
