"""Paged attention in torch, and by the CPU kernels, against the definition, row by row over whole sequences."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moonlang.attention import torch_native
from moonlang.attention.batch import AttentionSpec, BatchLayout, ForwardContext
from moonlang.base.registry import find
from moonlang.config.host import cpu_kernels
from moonlang.core.kv import KvSchema
from moonlang.model_executor.kv_pool import KvPool

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
LAYER = 1  # the last: an index that forgets the layer is wrong here


def definition(q: Tensor, k: Tensor, v: Tensor, start: int, spec: AttentionSpec) -> Tensor:
    """q: [n, H, D] from position `start` on, k, v: [S, K, D] -> [n, H, D], one score at a time."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q, k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = torch.arange(start, start + len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (spec.window or len(k) + 1))
    return torch.einsum("hns,shd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


class Batch:
    """Random sequences of which the last `length` tokens are new and the rest lie in the pool already."""

    def __init__(self, rows: list[tuple[int, int]], page: int) -> None:
        torch.manual_seed(0)
        self.rows = rows
        self.q = torch.randn(sum(n for _, n in rows), HEADS, DIM)
        self.kv = [torch.randn(2, start + n, KV_HEADS, DIM) for start, n in rows]
        needs = [-(-(start + n) // page) for start, n in rows]
        schema = KvSchema(
            num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=page, dtype="float32", itemsize=4
        )
        self.pool = KvPool(schema, sum(needs) + 1)
        self.pool.buffer.fill_(float("nan"))  # what nobody wrote must never be read
        ids = list(range(sum(needs) + 1))
        random.Random(0).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(need)] for need in needs]
        self.layout = self._layout(page)
        for (start, _), kv, table in zip(rows, self.kv, self.tables, strict=True):
            for position in range(start):
                at = table[position // page], slice(None), position % page
                if position % page == 0:
                    self.pool.buffer[table[position // page]] = 0
                self.pool.key(LAYER)[at], self.pool.value(LAYER)[at] = kv[0, position], kv[1, position]

    def _layout(self, page: int) -> BatchLayout:
        starts, lengths = [s for s, _ in self.rows], [n for _, n in self.rows]
        tokens = [(row, p) for row, (s, n) in enumerate(self.rows) for p in range(s, s + n)]
        widest = max(map(len, self.tables))
        return BatchLayout(
            num_decode=next((i for i, n in enumerate(lengths) if n > 1), len(lengths)),
            starts=torch.tensor(starts),
            lengths=torch.tensor(lengths),
            positions=torch.tensor([p for _, p in tokens]),
            page_table=torch.tensor([table + [0] * (widest - len(table)) for table in self.tables]),
            store_page=torch.tensor([self.tables[row][p // page] for row, p in tokens]),
            store_offset=torch.tensor([p % page for _, p in tokens]),
            row_starts=starts,
            row_lengths=lengths,
        )

    def check(self, spec: AttentionSpec, backend: str = "torch_native") -> None:
        new = torch.cat([kv[:, -n:] for kv, (_, n) in zip(self.kv, self.rows, strict=True)], 1)
        ctx = ForwardContext(self.layout, self.pool, find("attention", backend).BACKEND())
        got = ctx.attend(LAYER, self.q, new[0], new[1], spec)
        queries = self.q.split([n for _, n in self.rows])
        expected = [
            definition(q, *kv, start, spec) for q, kv, (start, _) in zip(queries, self.kv, self.rows, strict=True)
        ]
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)


SPECS = {
    "plain": AttentionSpec(scale=0.3),
    "window": AttentionSpec(scale=0.3, window=7),
    "softcap": AttentionSpec(scale=0.3, softcap=1.5),
    "both": AttentionSpec(scale=0.3, window=20, softcap=1.5),
}
BATCHES = {
    "decode": [(0, 1), (3, 1), (31, 1), (32, 1), (50, 1)],
    "prefill": [(0, 2), (0, 33), (16, 20), (1, 40)],
    "mixed": [(5, 1), (47, 1), (0, 17), (32, 32)],
    "a last chunk of one token": [(5, 1), (0, 17), (16, 1), (0, 3)],
}


@pytest.fixture(params=["torch_native", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not cpu_kernels():
        pytest.skip("sgl-kernel is not installed")
    return request.param


@pytest.mark.parametrize("page", [1, 3, 16, 64])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_same_as_the_definition(rows: list[tuple[int, int]], spec: AttentionSpec, page: int, backend: str) -> None:
    Batch(rows, page).check(spec, backend)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rows_of_very_different_length(spec: AttentionSpec, backend: str) -> None:
    """Too uneven for one padded batch: several groups, and rows that are not in the order of their length."""
    Batch([(3, 1), (900, 1), (20, 1), (400, 1), (1, 1), (899, 1), (0, 5)], 16).check(spec, backend)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_small_memory_bounds(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds cut the work into more pieces and change nothing else."""
    monkeypatch.setattr(torch_native, "_PADDED_ELEMENTS", 3 * 64 * 2 * KV_HEADS * DIM)
    monkeypatch.setattr(torch_native, "_MASK_ELEMENTS", 300)
    Batch([(s, 1) for s in range(20, 64, 4)] + [(0, 50), (40, 23)], 4).check(spec)


def test_one_long_row_does_not_pad_the_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch([(4000, 1)] + [(s, 1) for s in range(40)], 16)
    gathered: list[int] = []
    decode = torch_native._decode

    def counting(group: Any, *rest: Any) -> Tensor:
        gathered.append(len(group.blocks) * 16 // (2 * KV_HEADS))
        return decode(group, *rest)

    monkeypatch.setattr(torch_native, "_decode", counting)
    batch.check(SPECS["plain"])
    assert sum(gathered) <= 4016 + 40 * torch_native._SHORT_TOKENS


def test_a_request_that_overflowed_does_not_poison_the_next_tenant_of_its_page() -> None:
    batch = Batch([(0, 1), (0, 3)], 16)
    batch.pool.buffer.fill_(float("nan"))
    batch.check(SPECS["plain"])
    batch.pool.buffer.fill_(float("inf"))
    batch.check(SPECS["both"])
