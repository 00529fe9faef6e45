"""Random batches for the attention tests: pages in a shuffled pool, and the float64 answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from sgl_kernel import reference_attention
from sgl_kernel.attention import AttendPlan, KvPages, attend
from torch import Tensor

POISON = float("nan")


@dataclass(kw_only=True)
class Case:
    """A batch of rows (start, length) of random numbers. Unused places of the pool are NaN where the type has one."""

    rows: list[tuple[int, int]]
    q_heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    seed: int = 0
    size: float = 1.0  # of the numbers in q
    shared: int = 0  # leading pages that all rows share
    layers: int = 2
    layer: int = 1
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.dim**-0.5
        self.kv_dtype = self.kv_dtype or self.dtype
        g = torch.Generator().manual_seed(self.seed)
        tokens = sum(length for _, length in self.rows)
        self.q = (torch.randn(tokens, self.q_heads, self.dim, generator=g) * self.size).to(self.dtype)
        counts = [-(-(start + length) // self.page) for start, length in self.rows]
        pages = sum(counts) + 3
        order = torch.randperm(pages, generator=g)
        self.table = torch.zeros(len(self.rows), max(counts), dtype=torch.int32)
        at = 0
        for i, count in enumerate(counts):
            self.table[i, :count] = order[at : at + count]
            at += count
            self.table[i, : min(self.shared, count)] = self.table[0, : min(self.shared, count)]
        shape = (pages, self.layers, 2, self.kv_heads, self.page, self.dim)
        numbers = torch.randn(shape, generator=g)
        self.buffer = torch.full(shape, POISON).to(self.kv_dtype)
        for i, (start, length) in enumerate(self.rows):
            for position in range(start + length):
                page, offset = int(self.table[i, position // self.page]), position % self.page
                self.buffer[page, :, :, :, offset] = numbers[page, :, :, :, offset].to(self.kv_dtype)
        self.sink_scores = torch.randn(self.q_heads, generator=g) if self.sinks else None

    def run(self, rows: list[tuple[int, int, int]] | None = None) -> Tensor:
        """Attention of all rows, or of the given parts (row, start, length) as the rows of one batch: [T, H, D]."""
        parts = [(i, start, length) for i, (start, length) in enumerate(self.rows)] if rows is None else rows
        firsts = np.cumsum([0] + [length for _, length in self.rows])
        tokens = [firsts[row] + start - self.rows[row][0] + i for row, start, length in parts for i in range(length)]
        q = self.q[tokens].flatten(1).contiguous()
        out = torch.full_like(q, POISON)
        plan = AttendPlan()
        plan.build(
            self.table[[row for row, _, _ in parts]].contiguous(),
            torch.tensor([start for _, start, _ in parts], dtype=torch.int32),
            torch.tensor([length for _, _, length in parts], dtype=torch.int32),
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            page_tokens=self.page,
            value_dim=self.dim,
            window=self.window,
        )
        attend(
            plan,
            q,
            KvPages(self.buffer, self.layer),
            out,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sink_scores,
        )
        return out.view(-1, self.q_heads, self.dim)

    def row_kv(self, row: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [end, K, D] of a row, as float64."""
        positions = torch.arange(end)
        pages = self.table[row, positions // self.page].long()
        picked = self.buffer[pages, self.layer, :, :, positions % self.page].double().numpy()
        return picked[:, 0], picked[:, 1]

    def expected(self) -> Tensor:
        """The float64 answer: [T, H, D]."""
        outs, first = [], 0
        for row, (start, length) in enumerate(self.rows):
            keys, values = self.row_kv(row, start + length)
            outs.append(
                reference_attention.attend(
                    self.q[first : first + length].double().numpy(),
                    keys,
                    values,
                    start,
                    scale=self.scale,
                    window=self.window,
                    softcap=self.softcap,
                    sinks=None if self.sink_scores is None else self.sink_scores.double().numpy(),
                )
            )
            first += length
        return torch.from_numpy(np.concatenate(outs))
