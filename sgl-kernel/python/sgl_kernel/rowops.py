"""Operations on the rows of an activation matrix. Element types: float32, bfloat16 or float16, one for all arrays."""

from typing import Any

from sgl_kernel import _C


def rms_norm(x: Any, weight: Any, eps: float, *, y: Any = None, residual: Any = None, gemma: bool = False) -> None:
    """Root-mean-square normalisation of the rows of `x` [rows, dim], with a residual sum before or after it.

    With `y` [rows, dim] alone: y = norm(x); `y` may be `x`. With `y` and `residual` [rows, dim]: residual += x, then
    y = norm(residual). With `residual` alone: residual += norm(x).

    The Llama form rounds x / rms to the element type before it multiplies by `weight` [dim]. The Gemma form multiplies
    in float32 by a float32 `weight` [dim], to which the one is already added, and rounds once.
    """
    _C.rms_norm(x, weight, eps, gemma, y, residual)


def gated(x: Any, y: Any, act: str) -> None:
    """`y` [rows, dim] = act(x[:, :dim]) * x[:, dim:] for `x` [rows, 2 dim]. act: silu, gelu_tanh, gelu_erf or relu."""
    _C.gated(x, y, act)


def embedding(ids: Any, table: Any, y: Any, scale: float = 1.0) -> None:
    """`y` [rows, dim] = table[ids] * scale, for `ids` [rows] int64 and `table` [vocab, dim]."""
    _C.embedding(ids, table, y, scale)
