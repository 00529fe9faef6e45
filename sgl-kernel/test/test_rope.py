"""Norm, rotation and page writes against the same steps in torch, rounded where the model's layers round."""

from __future__ import annotations

import pytest
import torch
from sgl_kernel.attention import KvPages
from sgl_kernel.rope import rope_store
from torch import Tensor

_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
_PAGE, _EPS = 16, 1e-6


def _allowed(dtype: torch.dtype) -> dict[str, float]:
    """A rounding more or less of a term: what is left when two terms of up to 4 nearly cancel is off by that much."""
    eps = torch.finfo(dtype).eps
    return {"atol": 2e-6 if dtype == torch.float32 else 4 * eps, "rtol": 2 * eps}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """Llama form for weights of x's type, Gemma form for float32 ones."""
    wide = x.float()
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + _EPS).rsqrt()
    return wide.to(x.dtype) * weight if weight.dtype == x.dtype else (wide * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: [T, N, R]; cos, sin: [T, 1, R], sines of the first of each pair negated."""
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = torch.cat(x.chunk(2, -1)[::-1], -1)
    if cos.dtype == x.dtype:
        return torch.addcmul(x * cos, swapped, sin)
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


def _places(tokens: int, pages: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(pages * _PAGE)[:tokens]
    return (order // _PAGE).int(), (order % _PAGE).int()


def _tables(count: int, dim: int, dtype: torch.dtype, interleaved: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos, sin with `dim` columns, and with half as many."""
    angle = torch.rand(count, dim // 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(1), cos, sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), cos, sin


@_DTYPES
@pytest.mark.parametrize("norm", ["none", "llama", "gemma"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("dim", "begin", "rotated"), [(128, 0, 128), (72, 0, 24), (72, 40, 32)])
def test_equals_torch(dtype: torch.dtype, norm: str, interleaved: bool, dim: int, begin: int, rotated: int) -> None:
    tokens, heads, kv_heads = 21, 4, 2
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    for table_type in {dtype, torch.float32}:
        cos, sin, half_cos, half_sin = _tables(50, rotated, table_type, interleaved)
        positions = torch.randint(0, 50, (tokens,))
        weight_type = torch.float32 if norm == "gemma" else dtype
        weights = None if norm == "none" else [(torch.randn(dim) + 1).to(weight_type) for _ in range(2)]
        q, k, v = qkv.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        expected = []
        for i, x in enumerate((q, k)):
            y = x.clone() if weights is None else _norm(x, weights[i])
            part = slice(begin, begin + rotated)
            y[..., part] = _rotate(y[..., part], cos[positions][:, None], sin[positions][:, None], interleaved)
            expected.append(y)
        for table in ((cos, sin), (half_cos, half_sin)):
            buffer = torch.full((4, 2, 2, kv_heads, _PAGE, dim), float("nan")).to(dtype)
            page, offset = _places(tokens, 4)
            x = qkv.clone()
            rope_store(
                x[:, : heads * dim], x[:, heads * dim : (heads + kv_heads) * dim], x[:, (heads + kv_heads) * dim :],
                KvPages(buffer, 1), page, offset, cos=table[0], sin=table[1], positions=positions.int(),
                rotary_dim=rotated, rotary_begin=begin, interleaved=interleaved, eps=_EPS,
                q_norm=weights and weights[0], k_norm=weights and weights[1],
            )  # fmt: skip
            stored = buffer[page.long(), 1, :, :, offset.long()]
            # One unit in the last place: sums of squares have another order here.
            allowed = _allowed(dtype)
            torch.testing.assert_close(x[:, : heads * dim].unflatten(-1, (-1, dim)), expected[0], **allowed)
            torch.testing.assert_close(stored[:, 0], expected[1], **allowed)
            assert torch.equal(stored[:, 1], v)
            assert buffer.isnan().sum() == buffer.numel() - stored.numel()


@_DTYPES
def test_queries_into_another_array_and_latents(dtype: torch.dtype) -> None:
    """MLA: one latent per token, normalised in front and rotated behind, no values."""
    tokens, heads, latent, rotated = 9, 3, 64, 16
    dim = latent + rotated
    q, k = torch.randn(tokens, heads * dim).to(dtype), torch.randn(tokens, dim).to(dtype)
    cos, sin, _, _ = _tables(tokens, rotated, dtype, True)
    weight = torch.randn(latent).to(dtype)
    buffer = torch.zeros(2, 1, _PAGE, dim, dtype=dtype)
    page, offset = _places(tokens, 2)
    out, before = torch.empty_like(q), q.clone()
    kv = KvPages(buffer, 0, value_dim=latent)
    rope_store(
        q, k, None, kv, page, offset, cos=cos, sin=sin, rotary_dim=rotated, rotary_begin=latent, interleaved=True,
        k_norm=weight, eps=_EPS, q_out=out,
    )  # fmt: skip
    q_heads = q.unflatten(-1, (-1, dim)).clone()
    q_heads[..., latent:] = _rotate(q_heads[..., latent:], cos[:, None], sin[:, None], True)
    tail = _rotate(k[:, None, latent:], cos[:, None], sin[:, None], True)[:, 0]
    allowed = _allowed(dtype)
    torch.testing.assert_close(out.unflatten(-1, (-1, dim)), q_heads, **allowed)
    stored = buffer[page.long(), 0, offset.long()]
    torch.testing.assert_close(stored, torch.cat((_norm(k[:, :latent], weight), tail), -1), **allowed)
    assert torch.equal(q, before)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("inline", [False, True], ids=["static", "inline"])
def test_narrow_pages(kind: torch.dtype, inline: bool) -> None:
    tokens, kv_heads, dim = 11, 2, 48
    k, v = torch.randn(tokens, kv_heads * dim), (torch.randn(tokens, kv_heads * dim) * 3).clamp(-6, 6)  # no saturation
    page, offset = _places(tokens, 2)
    scales = torch.tensor([0.05, 0.1])
    buffer = torch.zeros(2, 1, 2, kv_heads, _PAGE, dim + 4 * inline, dtype=torch.uint8).view(kind)
    given = {"inline_scales": True} if inline else {"key_scale": scales, "value_scale": scales}
    rope_store(None, k, v, KvPages(buffer, 0, **given), page, offset)
    stored = buffer[page.long(), 0, :, :, offset.long()]
    if inline:
        scale = stored[..., dim:].contiguous().view(torch.float32)
    else:
        scale = scales.view(1, 1, kv_heads, 1)
    # Half a step: of the whole range for int8, of the number itself for the floats.
    relative = {torch.int8: 0.0, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[kind]
    absolute = 0.51 * float(scale.max())
    read = stored[..., :dim].float() * scale
    expected = torch.stack((k, v), 1).unflatten(-1, (kv_heads, dim))
    torch.testing.assert_close(read, expected, atol=absolute, rtol=relative)


def test_refusals() -> None:
    k = torch.randn(3, 64)
    kv = KvPages(torch.zeros(2, 1, 2, 1, _PAGE, 64), 0)
    page, offset = _places(3, 2)
    with pytest.raises(ValueError, match="store_page"):
        rope_store(None, k, k, kv, page + 2, offset)
    with pytest.raises(ValueError, match="rotary_dim"):
        rope_store(None, k, k, kv, page, offset, cos=torch.zeros(3, 8), sin=torch.zeros(3, 8), rotary_dim=64)
    with pytest.raises(ValueError, match="type of k"):
        rope_store(None, k, k.half(), kv, page, offset)
