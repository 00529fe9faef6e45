"""Packed weights and their product with activations."""

from typing import Any

from sgl_kernel import _C


def arena(chunk_bytes: int = 64 << 20) -> Any:
    """Memory on huge pages for many weights; smaller ones share chunks of `chunk_bytes`."""
    return _C.Arena(chunk_bytes)


def pack(weights: Any, *, kind: str = "bf16", gated: bool = False, arena: Any = None, segments: int = 1) -> Any:
    """Lay out weights for `gemm`.

    weights: [N, K] (out, in) in float32, bfloat16 or float16, or a sequence of them, which are stacked along N.
    kind: "bf16" or "f32", what the packed weight holds.
    gated: the rows are [gate; up]; `gemm` then returns act(gate) * up with N / 2 columns.
    segments: 1, 2, 4 or 8 equal parts of K that are summed each by itself and then as a binary tree.
    Returns a PackedWeight: kind, n, k, gated, segments, columns (of the product), bytes, memory() (uint8 view).
    """
    sources: list[Any] = list(weights) if isinstance(weights, list | tuple) else [weights]
    return _C.pack(sources, kind, gated, arena if arena is not None else _C.Arena(), segments)


def gemm(w: Any, x: Any, y: Any, *, bias: Any = None, residual: Any = None, act: str = "none") -> None:
    """y = act(x W^T + bias) + residual, or act(gate) * up + residual for a gated weight.

    x: [M, K] and y: [M, w.columns], float32, bfloat16 or float16, rows any distance apart.
    bias: float32 [N] in the order of the packed rows. residual: shape and type of y, may be y itself.
    act: "none", "silu", "gelu_tanh", "gelu_erf" or "relu".
    Sums are float32, one chain per output and segment in the order of K: a row's bits depend on no other row and on no
    thread.
    """
    _C.gemm(w, x, y, bias, residual, act)
