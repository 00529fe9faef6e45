"""Attention over keys and values in pages."""

from __future__ import annotations

from typing import Any

from sgl_kernel import _C


class KvPages:
    """One layer of a pool of pages, as kernels see it.

    buffer: [P, L, 2, K, p, D] of float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8; or [P, L, p, D] for
    an absorbed latent (MLA): one head whose values are the first `value_dim` numbers of its keys.
    key_scale, value_scale: [K] float32; stored numbers times these are the keys and values.
    inline_scales: each row of D numbers is followed by its own float32 scale, so the last dimension has 4 bytes more.
    """

    __slots__ = ("_view",)

    def __init__(
        self,
        buffer: Any,
        layer: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        inline_scales: bool = False,
        key_scale: Any = None,
        value_scale: Any = None,
    ) -> None:
        extra = 4 // buffer.dtype.itemsize if inline_scales else 0
        key_dim = buffer.shape[-1] - extra if key_dim is None else key_dim
        value_dim = key_dim if value_dim is None else value_dim
        self._view = _C.KvPages(buffer, layer, key_dim, value_dim, inline_scales, key_scale, value_scale)

    @property
    def address(self) -> int:
        """Of the ml::KvView, for programs; valid as long as this object."""
        return self._view.address


class AttendPlan:
    """Who computes what for the rows of one forward; layers of one window size share it.

    Row i has lengths[i] queries at positions starts[i] and on, whose keys are in the pages already. Rows that begin
    with the same pages read them together.
    """

    __slots__ = ("_plan",)

    def __init__(self) -> None:
        self._plan = _C.AttendPlan()

    def build(
        self,
        page_table: Any,
        starts: Any,
        lengths: Any,
        *,
        q_heads: int,
        kv_heads: int,
        page_tokens: int,
        value_dim: int,
        window: int = 0,
    ) -> None:
        """page_table: [B, Pmax] int32, kept and read by `attend`; starts, lengths: [B] int32. window 0: none."""
        self._plan.build(page_table, starts, lengths, q_heads, kv_heads, page_tokens, value_dim, window)

    @property
    def address(self) -> int:
        """Of the ml::AttendPlan, for programs; valid as long as this object."""
        return self._plan.address

    @property
    def items(self) -> int:
        """Tasks per kv head."""
        return self._plan.items

    @property
    def partial_floats(self) -> int:
        """Size of the buffer for results of split rows; 0 when no row is split."""
        return self._plan.partial_floats


def attend(
    plan: AttendPlan, q: Any, kv: KvPages, out: Any, *, scale: float, softcap: float = 0.0, sinks: Any = None
) -> None:
    """out = softmax(scale * q k^T) v over the keys that each query may see.

    Those are the ones at its position and before, and with a window w only the last w of them.

    q: [T, H * key_dim], out: [T, H * value_dim] of one dtype (float32, bfloat16, float16), rows any distance apart.
    softcap c: scores are c * tanh(s / c). sinks: [H] float32, scores of one more key per head that has no value.
    """
    _C.attend(plan._plan, q, kv._view, out, scale, softcap, sinks)
