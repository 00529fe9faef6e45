"""Weights, quantised or not, in the layout of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sgl_kernel
import torch
from sgl_kernel.program import PackedWeight
from torch import Tensor

from moonlang.kernels.matrix import QuantizedMatrix


def pack(
    parts: Sequence[Tensor | QuantizedMatrix], *, kind: str, gated: bool, arena: Any, segments: int = 1
) -> PackedWeight:
    """The parts one below the other as one weight. kind: "f32" or "bf16", of what is not quantised.

    Parts that do not go together (one is a float, or their inputs are in different orders), and groups of a size
    without a kernel, are dequantised: right, but no smaller than floats. segments: of the sums over K, see
    `sgl_kernel.pack` and `QuantizedMatrix.segments`.
    """
    matrices = [part for part in parts if isinstance(part, QuantizedMatrix)]
    if not matrices or len(matrices) < len(parts) or not _go_together(matrices):
        return sgl_kernel.pack(
            [_as_float(part) for part in parts], kind=kind, gated=gated, arena=arena, segments=segments
        )
    first = matrices[0]
    return sgl_kernel.pack_quantized(
        [part.codes for part in matrices],
        [part.scales for part in matrices],
        [part.zeros for part in matrices],
        kind=first.kind,
        group=first.group,
        lead=first.lead,
        order=None if first.order is None else first.order.int(),
        gated=gated,
        arena=arena,
        segments=first.segments(segments),
    )


def _as_float(part: Tensor | QuantizedMatrix) -> Tensor:
    return part.dequantized() if isinstance(part, QuantizedMatrix) else part


def _go_together(matrices: Sequence[QuantizedMatrix]) -> bool:
    first = matrices[0]
    zeros = any(matrix.zeros is not None for matrix in matrices)
    if sgl_kernel.why_not_packable(first.kind, first.shape[1], first.group, zeros):
        return False
    return all(
        (m.kind, m.group, m.lead) == (first.kind, first.group, first.lead) and _same(m.order, first.order)
        for m in matrices
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
