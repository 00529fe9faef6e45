"""Norms round as the models' authors do, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moonlang.layers.norm import GemmaRmsNorm, RmsNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(200, 96) * 3).to(dtype), torch.randn(96).to(dtype)
    ours, theirs = RmsNorm(96, 1e-5, dtype), LlamaRMSNorm(96, 1e-5).to(dtype)
    ours.weight.copy_(weight)
    theirs.weight.data.copy_(weight)
    assert torch.equal(ours(x), theirs(x))
    gemma, reference = GemmaRmsNorm(96, 1e-6, dtype), Gemma2RMSNorm(96, 1e-6).to(dtype)
    gemma.weight.copy_(weight.float() + 1.0)
    reference.weight.data.copy_(weight)
    assert torch.equal(gemma(x), reference(x))


def test_float32() -> None:
    x = torch.randn(20, 96)
    norm = RmsNorm(96, 1e-5, torch.float32)
    norm.weight.copy_(torch.randn(96))
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
