"""Matrix multiplications, whole or shared by tensor-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonlang.config.shard import Shard, segments
from moonlang.distributed.group import Group
from moonlang.layers.cut import Cut, Cuts

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


class Projection(nn.Module):
    """weight: [out, in] and bias: [out] or None, uninitialised until a loader fills them.

    cuts: what a rank holds of the tensors that make up the weight. Rows of a weight are outputs of their own: nothing
    has to be put together.
    segments: of the inputs, each summed by itself.
    """

    segments = 1

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, cuts: Cuts = ()) -> None:
        super().__init__()
        self.cuts = cuts
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None


class Linear(Projection):
    """y = x W^T + b.

    Projections that read the same input are one Linear whose weight is the concatenation of theirs along `out`
    (q, k, v; gate, up): one call instead of three. The weights map of the model says which tensors go where.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        return project(x, self.weight, self.bias)

    def lower(self, build: Builder, x: Value, *, residual: Value | None = None, act: str | None = None) -> Value:
        """The same as kernel calls. act: the weight is a gate above an up; act(gate) * up comes out."""
        weight = build.matrix(self.weight, gated=act is not None)
        bias = None if self.bias is None else build.vector(self.bias)
        return build.linear(x, weight, bias=bias, residual=residual, act=act)


class RowLinear(Linear):
    """A Linear whose inputs are shared by the ranks: each multiplies its own, and the products are added up.

    inputs: of all ranks. The kernels add the products of eight segments of the inputs as a binary tree, with or without
    ranks: so every number of ranks that divides eight gives the same bits.

    group: those who add up; set when the model is complete, None while there is one rank.
    """

    group: Group | None = None

    def __init__(self, inputs: int, outputs: int, *, shard: Shard, bias: bool, dtype: torch.dtype) -> None:
        part = shard.part(inputs)
        cuts = (Cut(1, part, inputs),) if shard.size > 1 else ()
        super().__init__(len(part), outputs, bias=bias, dtype=dtype, cuts=cuts)
        self.segments = segments(inputs, shard.size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, this rank's inputs] -> [T, out], on every rank."""
        if self.group is None:
            return project(x, self.weight, self.bias)
        total = self.group.all_reduce(project(x, self.weight).float())
        return (total if self.bias is None else total + self.bias).to(x.dtype)

    def lower(self, build: Builder, x: Value, *, residual: Value | None = None, act: str | None = None) -> Value:
        """The same as kernel calls. No activation may follow."""
        if act is not None:
            raise ValueError("An activation belongs behind the products of all ranks.")
        bias = None if self.bias is None else build.vector(self.bias)
        weight = build.matrix(self.weight, segments=self.segments)
        return build.linear(x, weight, bias=bias, residual=residual, shared=bool(self.cuts))
