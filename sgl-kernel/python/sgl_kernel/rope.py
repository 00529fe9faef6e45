"""Between the fused projection and attention: norm and rotation of q and k heads, and the write into pages."""

from __future__ import annotations

from typing import Any

from sgl_kernel import _C
from sgl_kernel.attention import KvPages


def rope_store(
    q: Any,
    k: Any,
    v: Any,
    kv: KvPages,
    store_page: Any,
    store_offset: Any,
    *,
    cos: Any = None,
    sin: Any = None,
    positions: Any = None,
    rotary_dim: int = 0,
    rotary_begin: int = 0,
    interleaved: bool = False,
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
    q_out: Any = None,
) -> None:
    """Normalise and rotate q (in place, or into q_out) and k, and store k and v in pages.

    q: [T, H * D], k: [T, K * D], v: [T, K * Dv], float32, bfloat16 or float16; they may be column ranges of one array,
    and q or v may be None. store_page, store_offset: [T] int32.
    cos, sin: rows of `rotary_dim` numbers (the sines of the first of each pair negated) or of half as many, float32 or
    of q's type; positions [T] int32 picks the rows, without it token i has row i. Dimensions rotary_begin and on are
    rotated, in pairs (j, j + rotary_dim / 2), interleaved: (2j, 2j + 1).
    q_norm, k_norm: RMSNorm weights of the leading dimensions of each head. Weights of q's type: the normalised number
    is rounded, then multiplied (Llama); float32: multiplied, then rounded (Gemma, whose weight is 1 + w).
    """
    _C.rope_store(
        q, k, v, kv._view, store_page, store_offset, cos, sin, positions, rotary_begin, rotary_dim, interleaved,
        q_norm, k_norm, eps, q_out,
    )  # fmt: skip
