"""The bits of a query's result depend on its keys and values only: not on chunk, batch, threads or shared pages."""

from __future__ import annotations

import pytest
import sgl_kernel
import torch
from attention_case import Case
from sgl_kernel.attention import AttendPlan, KvPages, attend
from torch import Tensor

_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
_VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"window": 100}, {"softcap": 3.0, "sinks": True}, {"q_heads": 10, "kv_heads": 1, "page": 5, "dim": 48}],
    ids=["plain", "window", "softcap", "mqa"],
)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, so that -0 is not 0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _chunked(case: Case, row: int, size: int) -> Tensor:
    """The row, `size` tokens per call."""
    start, length = case.rows[row]
    parts = [(row, at, min(size, start + length - at)) for at in range(start, start + length, size)]
    return torch.cat([case.run([part]) for part in parts])


@_DTYPES
@_VARIANTS
def test_chunks(isa: str, dtype: torch.dtype, options: dict) -> None:
    case = Case(rows=[(0, 600)], dtype=dtype, **options)
    whole = case.run()
    for size in (512, 64, 16, 7):
        assert _same(_chunked(case, 0, size), whole), size
    for at in (0, 1, 15, 254, 255, 256, 257, 511, 512, 599):
        assert _same(case.run([(0, at, 1)])[0], whole[at]), at


@_DTYPES
@_VARIANTS
def test_alone_and_in_a_batch(isa: str, dtype: torch.dtype, options: dict) -> None:
    rows = [(37 * i, 1) for i in range(28)] + [(3000, 1), (5, 70), (500, 20), (511, 2)]
    case = Case(rows=rows, dtype=dtype, layers=1, layer=0, **options)
    batch = case.run()
    first = 0
    for i, (start, length) in enumerate(rows):
        assert _same(case.run([(i, start, length)]), batch[first : first + length]), i
        first += length


@_DTYPES
@_VARIANTS
@pytest.mark.parametrize("length", [1, 9])
def test_shared_pages(isa: str, dtype: torch.dtype, options: dict, length: int) -> None:
    rows = [(1100 + 40 * i, length) for i in range(5)]
    case = Case(rows=rows, dtype=dtype, shared=60, layers=1, layer=0, **options)
    batch = case.run()
    for i, (start, count) in enumerate(rows):
        assert _same(case.run([(i, start, count)]), batch[i * length : (i + 1) * length]), i
    assert _same(
        case.run([(i, *rows[i]) for i in (3, 1, 4)]),
        torch.cat([batch[i * length : (i + 1) * length] for i in (3, 1, 4)]),
    )


def test_shared_pages_are_read_once() -> None:
    """16 rows behind one prefix of four blocks: those blocks are one item, the rest of each row another."""
    pages, rows, page = 66, 16, 16
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    table[:, :64] = table[0, :64]
    starts, ones = torch.full((rows,), 1050, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    items = []
    for shared in (table, torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)):
        plan = AttendPlan()
        plan.build(shared, starts, ones, q_heads=16, kv_heads=8, page_tokens=page, value_dim=128)
        items.append(plan.items)
    assert items == [1 + rows, rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_pages(isa: str, dtype: torch.dtype) -> None:
    """MLA, absorbed: alone, in chunks and in a batch; pages [P, L, p, D], values the first numbers of the keys."""
    tokens, key_dim, value_dim, heads, page = 530, 80, 64, 12, 16
    generator = torch.Generator().manual_seed(4)
    pages = -(-tokens // page)
    buffer = torch.randn(2 * pages, 2, page, key_dim, generator=generator).to(dtype)
    table = torch.randperm(2 * pages, generator=generator).int().view(2, pages)
    q = torch.randn(tokens, heads * key_dim, generator=generator).to(dtype)

    def attended(parts: list[tuple[int, int, int]]) -> Tensor:
        """parts: (row, start, length); both rows have the same queries."""
        queries = torch.cat([q[start : start + length] for _, start, length in parts])
        out = torch.full((len(queries), heads * value_dim), float("nan"), dtype=dtype)
        plan, numbers = AttendPlan(), torch.tensor(parts, dtype=torch.int32)
        shape = {"q_heads": heads, "kv_heads": 1, "page_tokens": page, "value_dim": value_dim}
        plan.build(table[numbers[:, 0].long()].contiguous(), *numbers[:, 1:].T.contiguous(), **shape)
        attend(plan, queries, KvPages(buffer, 1, value_dim=value_dim), out, scale=0.1)
        return out

    whole = attended([(0, 0, tokens)])
    assert whole.isfinite().all()
    assert _same(torch.cat([attended([(0, at, min(64, tokens - at))]) for at in range(0, tokens, 64)]), whole)
    decoded = attended([(0, 529, 1), (1, 300, 1), (0, 255, 1), (1, 0, 40)])
    assert _same(decoded[[0, 2]], whole[[529, 255]])
    assert _same(decoded[1:2], attended([(1, 300, 1)]))


@_DTYPES
def test_threads(isa: str, dtype: torch.dtype) -> None:
    case = Case(rows=[(2500, 1), (40, 1), (0, 300)], dtype=dtype, kv_heads=1, layers=1, layer=0)
    before = sgl_kernel.threads()
    outs = []
    for threads in (1, 2, 5):
        sgl_kernel.set_threads(threads)
        outs.append(case.run())
        outs.append(case.run([(0, 2500, 1)]))
    sgl_kernel.set_threads(before)
    assert _same(outs[0], outs[2])
    assert _same(outs[0], outs[4])
    assert all(_same(out, outs[0][:1]) for out in outs[1::2])


@_DTYPES
def test_strangers_in_the_pages(isa: str, dtype: torch.dtype) -> None:
    """What lies behind the last token, and before the window, is not read: it may be NaN or somebody's numbers."""
    case = Case(rows=[(300, 1), (280, 30)], dtype=dtype, window=40)
    before = case.run()
    for row, (start, length) in enumerate(case.rows):
        for page in range((start - 40) // case.page):
            case.buffer[case.table[row, page]] = float("nan")
        case.buffer[case.table[row, (start + length) // case.page], :, :, :, (start + length) % case.page :] = float(
            "inf"
        )
    assert _same(case.run(), before)
