"""The one form that all quantised matrices are brought into before kernels pack them or torch dequantises them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNIT = 4  # columns that the kernels multiply at a time
_CHUNK = 128  # the longest sum under one scale in the kernels

Kind = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "w8a8"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """A weight matrix [N, K] (out, in): W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = (lead + k) // group.

    kind    int4: codes in [-8, 7]; int8: [-128, 127]; w8a8: [-127, 127], and the input is quantised to int8 too, per
            token; fp8_*: codes are float8
    codes   [N, K] int8 or float8
    scales  [N, G] float32, G = ceil((lead + K) / group)
    zeros   [N, G] float32, or None for all zero
    lead    by how much the first group is shorter, where a rank's part begins within one
    order   [K] int64: column k of `codes` multiplies input element order[k]; None: element k
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int
    lead: int = 0
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantized(self) -> Tensor:
        """[N, K] float32, columns in the order of the input."""
        values = self.codes.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros)
        values *= self._spread(self.scales)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)

    def segments(self, wanted: int) -> int:
        """In how many of the `wanted` segments of K its products are summed: in one where the columns are in an order
        of their own, or their number is no multiple of the kernels' unit in each."""
        return 1 if self.order is not None or self.codes.shape[1] % (UNIT * wanted) else wanted

    def rows(self, part: range) -> QuantizedMatrix:
        """Rows `part`: views."""
        rows = slice(part.start, part.stop)
        zeros = None if self.zeros is None else self.zeros[rows]
        return dataclasses.replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def columns(self, part: range) -> QuantizedMatrix | Tensor:
        """Columns `part`, for the elements `part` of the input.

        Where the columns are in an order of their own, those elements may belong to any group: floats then.
        """
        if self.order is not None:
            return self.dequantized()[:, part.start : part.stop]
        codes = self.codes[:, part.start : part.stop].contiguous()
        if self.scales.shape[1] == 1:
            return dataclasses.replace(self, codes=codes, group=len(part), lead=0)
        # Kernels cut larger groups into chunks, counted from the first column of the matrix: so must these be.
        each = self.group // _CHUNK if self.group % _CHUNK == 0 else 1
        group, begin = self.group // each, self.lead + part.start
        groups = slice(begin // group, -(-(begin + len(part)) // group))

        def held(values: Tensor) -> Tensor:
            return values.repeat_interleave(each, 1)[:, groups].contiguous()

        zeros = None if self.zeros is None else held(self.zeros)
        scales = held(self.scales)
        return dataclasses.replace(self, codes=codes, scales=scales, zeros=zeros, group=group, lead=begin % group)

    def _spread(self, per_group: Tensor) -> Tensor:
        """[N, G] -> [N, K], or [N, 1] when one group covers all."""
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self.group, 1)[:, self.lead : self.lead + self.codes.shape[1]]
