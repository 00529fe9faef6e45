"""The one form that all quantised matrices are brought into before kernels pack them or torch dequantises them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "w8a8"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """A weight matrix [N, K] (out, in): W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with g = k // group.

    kind    int4: codes in [-8, 7]; int8: [-128, 127]; w8a8: [-127, 127], and the input is quantised to int8 too, per
            token; fp8_*: codes are float8
    codes   [N, K] int8 or float8
    scales  [N, G] float32, G = ceil(K / group)
    zeros   [N, G] float32, or None for all zero
    order   [K] int64: column k of `codes` multiplies input element order[k]; None: element k
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantized(self) -> Tensor:
        """[N, K] float32, columns in the order of the input."""
        columns = self.codes.shape[1]
        values = self.codes.float()
        if self.zeros is not None:
            values -= _spread(self.zeros, self.group, columns)
        values *= _spread(self.scales, self.group, columns)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)


def _spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """[N, G] -> [N, K], or [N, 1] when one group covers all."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group, 1)[:, :columns]
