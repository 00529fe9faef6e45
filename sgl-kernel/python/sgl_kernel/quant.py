"""Quantised weights for `gemm`."""

from collections.abc import Sequence
from typing import Any

from sgl_kernel import _C


def pack_quantized(
    codes: Sequence[Any],
    scales: Sequence[Any],
    zeros: Sequence[Any] | None = None,
    *,
    kind: str,
    group: int,
    lead: int = 0,
    order: Any = None,
    gated: bool = False,
    arena: Any = None,
    segments: int = 1,
) -> Any:
    """Lay out matrices W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = (lead + k) // group, stacked along N.

    codes: [N, K] each: int8, for "int4" within [-8, 7], for "w8a8" within [-127, 127]; for "fp8_e4m3" and "fp8_e5m2"
    float8_e4m3fn and float8_e5m2, without NaN and infinities.
    scales, zeros: float32 [N, ceil((lead + K) / group)] each; zeros, or one of them, may be None.
    group: lead + K or more for one scale per row; else a multiple of 4, beyond 128 of 128 (`why_not_packable`).
    lead: by how much the first group is shorter than the others.
    order: int32 [K]; column k multiplies element order[k] of a row of x. For one segment only.
    segments: as for `pack`, of a multiple of 4 elements each.
    The result goes into `gemm`. With "w8a8" that quantises x as well: int8, one scale per row and segment.
    """
    nothing: Sequence[Any] = [None] * len(codes)
    memory = arena if arena is not None else _C.Arena()
    return _C.pack_quantized(
        list(codes), list(scales), list(zeros or nothing), kind, group, lead, order, gated, memory, segments
    )


def why_not_packable(kind: str, k: int, group: int, zeros: bool) -> str:
    """Why there is no kernel for such a matrix; "" when there is one."""
    return _C.why_not_packable(kind, k, group, zeros)
