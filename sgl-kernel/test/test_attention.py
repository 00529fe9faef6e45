"""Attention against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from attention_case import Case
from sgl_kernel import reference_attention
from sgl_kernel.attention import AttendPlan, KvPages, attend

# Error of one output when numbers are of size one: the roundings of the weights and of the output itself.
_ALLOWED = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}

_CASES = [
    {"rows": [(0, 1)]},
    {"rows": [(0, 17), (255, 1), (256, 1), (300, 1)]},
    {"rows": [(513, 1), (700, 30)], "page": 1, "q_heads": 3, "kv_heads": 1, "dim": 48},
    {"rows": [(250, 20), (1, 1), (64, 2)], "page": 7, "q_heads": 2, "kv_heads": 2, "dim": 128},
    {"rows": [(600, 1), (590, 33), (0, 5)], "page": 64, "q_heads": 14, "kv_heads": 2, "window": 70},
    {"rows": [(511, 1), (512, 1), (513, 1), (1, 1)], "window": 256, "dim": 16},
    {"rows": [(300, 4), (20, 1)], "softcap": 4.0, "size": 3.0, "dim": 80},
    {"rows": [(300, 4), (20, 1), (0, 1)], "sinks": True, "page": 32, "dim": 256, "q_heads": 8},
    {"rows": [(10, 9), (290, 1)], "dim": 30, "window": 13, "softcap": 10.0, "sinks": True},
    {"rows": [(1600, 1), (1500, 1), (1300, 1)], "shared": 70, "page": 16, "dim": 32, "window": 900},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", _CASES, ids=range(len(_CASES)))
def test_equals_float64(isa: str, options: dict, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, seed=len(options), **options)
    out = case.run().double()
    torch.testing.assert_close(out, case.expected(), atol=_ALLOWED[dtype], rtol=_ALLOWED[dtype])


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_keys_and_values(isa: str, kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The reference reads the same narrow numbers, so only the arithmetic differs."""
    case = Case(rows=[(300, 1), (0, 40)], dtype=dtype, kv_dtype=kv_dtype, dim=72, size=0.3)
    out = case.run().double()
    torch.testing.assert_close(out, case.expected(), atol=5 * _ALLOWED[dtype], rtol=_ALLOWED[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_per_head_and_per_row(isa: str, dtype: torch.dtype) -> None:
    tokens, heads, dim, page = 300, 2, 64, 16
    generator = torch.Generator().manual_seed(3)
    pages = -(-tokens // page)
    stored = torch.randint(-127, 128, (pages, 1, 2, heads, page, dim), generator=generator, dtype=torch.int8)
    row_scale = torch.rand(pages, 1, 2, heads, page, 1, generator=generator) / 50 + 0.01
    buffer = torch.cat((stored, row_scale.view(torch.int8)), -1)
    q = torch.randn(1, heads * dim, generator=generator).to(dtype)
    table = torch.arange(pages, dtype=torch.int32)[None]
    key_scale, value_scale = torch.tensor([0.01, 0.02]), torch.tensor([0.03, 0.01])
    plan = AttendPlan()
    row = torch.tensor([tokens - 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    plan.build(table, *row, q_heads=heads, kv_heads=heads, page_tokens=page, value_dim=dim)
    for kv, scale in [
        (KvPages(buffer, 0, inline_scales=True), row_scale),
        (KvPages(stored, 0, key_scale=key_scale, value_scale=value_scale),
         torch.stack((key_scale, value_scale)).view(1, 1, 2, heads, 1, 1)),
    ]:  # fmt: skip
        out = torch.full_like(q, float("nan"))
        attend(plan, q, kv, out, scale=0.1)
        true = (stored.double() * scale.double())[:, 0].permute(1, 0, 3, 2, 4).reshape(2, -1, heads, dim)[:, :tokens]
        expected = reference_attention.attend(
            q.view(1, heads, dim).double().numpy(), true[0].numpy(), true[1].numpy(), tokens - 1, scale=0.1
        )
        torch.testing.assert_close(
            out.view(1, heads, dim).double(), torch.from_numpy(expected), atol=_ALLOWED[dtype], rtol=_ALLOWED[dtype]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_pages(isa: str, dtype: torch.dtype) -> None:
    """MLA, absorbed: one head, whose values are the first numbers of its keys."""
    tokens, key_dim, value_dim, heads, page = 290, 72, 64, 20, 8
    generator = torch.Generator().manual_seed(4)
    pages = -(-tokens // page)
    buffer = torch.randn(pages, 3, page, key_dim, generator=generator).to(dtype)
    q = torch.randn(3, heads * key_dim, generator=generator).to(dtype)
    out = torch.full((3, heads * value_dim), float("nan"), dtype=dtype)
    plan = AttendPlan()
    table = torch.arange(pages, dtype=torch.int32)[None]
    row = torch.tensor([tokens - 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    plan.build(table, *row, q_heads=heads, kv_heads=1, page_tokens=page, value_dim=value_dim)
    attend(plan, q, KvPages(buffer, 1, value_dim=value_dim), out, scale=0.1)
    latent = buffer[:, 1].reshape(-1, 1, key_dim)[:tokens].double().numpy()
    expected = reference_attention.attend(
        q.view(3, heads, key_dim).double().numpy(), latent, latent[:, :, :value_dim], tokens - 3, scale=0.1
    )
    out = out.view(3, heads, value_dim).double()
    torch.testing.assert_close(out, torch.from_numpy(expected), atol=_ALLOWED[dtype], rtol=_ALLOWED[dtype])


def test_large_scores_stay_finite(isa: str) -> None:
    case = Case(rows=[(300, 3)], dtype=torch.float32, size=1e18)
    assert case.run().isfinite().all()


def test_refusals() -> None:
    case = Case(rows=[(0, 4)], dim=16)
    plan, q = AttendPlan(), case.q.flatten(1)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="fit its page table"):
        plan.build(case.table, 100 * one, one, q_heads=4, kv_heads=2, page_tokens=16, value_dim=16)
    plan.build(case.table, 0 * one, 4 * one, q_heads=4, kv_heads=2, page_tokens=8, value_dim=16)
    with pytest.raises(ValueError, match="page size"):
        attend(plan, q, KvPages(case.buffer, 0), q.clone(), scale=1.0)
    with pytest.raises(ValueError, match="out"):
        attend(plan, q, KvPages(case.buffer, 0), q.float(), scale=1.0)
    with pytest.raises(ValueError, match="layer"):
        KvPages(case.buffer, 2)


def test_empty_batch() -> None:
    plan, none = AttendPlan(), torch.zeros(0, dtype=torch.int32)
    plan.build(torch.zeros(0, 1, dtype=torch.int32), none, none, q_heads=4, kv_heads=2, page_tokens=16, value_dim=64)
    case = Case(rows=[(0, 1)])
    attend(
        plan,
        torch.zeros(0, 256, dtype=torch.bfloat16),
        KvPages(case.buffer, 0),
        torch.zeros(0, 256, dtype=torch.bfloat16),
        scale=1.0,
    )
    assert plan.items == 0
