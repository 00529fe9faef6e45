"""Attention by `sgl_kernel`, for models that run as torch modules on a CPU.

The models of this package do not come here: they run as a whole as a program (see model_executor.program_network).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sgl_kernel
from torch import Tensor

from moonlang.attention.batch import AttentionSpec, BatchLayout, KvPages


@dataclass(slots=True)
class _Prepared:
    """int32 forms of the layout's tensors, and who computes what by window (0: none)."""

    page_table: Tensor
    starts: Tensor
    lengths: Tensor
    store_page: Tensor
    store_offset: Tensor
    plans: dict[int, sgl_kernel.AttendPlan] = field(default_factory=dict)


class CpuAttention:
    """Stateless: one object may serve any number of pools and models."""

    def prepare(self, layout: BatchLayout, pool: KvPages) -> _Prepared:
        """See `AttentionBackend.prepare`."""
        return _Prepared(
            layout.page_table.int(),
            layout.starts.int(),
            layout.lengths.int(),
            layout.store_page.int(),
            layout.store_offset.int(),
        )

    def attend(
        self,
        prepared: _Prepared,
        pool: KvPages,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        buffer = pool.buffer if v is not None else pool.buffer[:, :, 0, 0]
        pages = sgl_kernel.KvPages(buffer, layer, value_dim=spec.value_dim, inline_scales=pool.inline_scales)
        q, k = q.contiguous(), k.contiguous().flatten(1)
        stored = None if v is None else v.contiguous().flatten(1)
        sgl_kernel.rope_store(None, k, stored, pages, prepared.store_page, prepared.store_offset)
        out = q.new_empty(*q.shape[:2], spec.value_dim or q.shape[2])
        kv_heads = pool.buffer.shape[3]
        plan = self._plan(prepared, q.shape[1], kv_heads, out.shape[2], pool.buffer.shape[4], spec.window or 0)
        scores = None if sinks is None else sinks.float()
        softcap = spec.softcap or 0.0
        sgl_kernel.attend(plan, q.flatten(1), pages, out.flatten(1), scale=spec.scale, softcap=softcap, sinks=scores)
        return out

    @staticmethod
    def _plan(
        prepared: _Prepared, q_heads: int, kv_heads: int, dim: int, page: int, window: int
    ) -> sgl_kernel.AttendPlan:
        plan = prepared.plans.get(window)
        if plan is None:
            plan = prepared.plans[window] = sgl_kernel.AttendPlan()
            plan.build(
                prepared.page_table,
                prepared.starts,
                prepared.lengths,
                q_heads=q_heads,
                kv_heads=kv_heads,
                page_tokens=page,
                value_dim=dim,
                window=window,
            )
        return plan


BACKEND = CpuAttention
