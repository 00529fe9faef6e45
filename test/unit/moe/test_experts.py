"""The experts of a layer against one token and one expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moonlang.moe.experts import Experts


def filled(dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(0)
    experts = Experts(5, 24, 16, act="silu", dtype=dtype)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return experts


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weights = torch.randn(tokens, 24), torch.rand(tokens, 3)
    return x, weights, torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])


def test_weighted_sum_over_the_chosen() -> None:
    experts = filled()
    x, weights, chosen = batch(9)
    for token, got in enumerate(experts(x, weights, chosen)):
        expected = torch.zeros(24)
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).split(16)
            expected += weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(got, expected)


def test_a_token_is_alone_in_any_batch() -> None:
    experts = filled()
    x, weights, chosen = batch(33)
    together = experts(x, weights, chosen)
    alone = torch.cat([experts(x[i : i + 1], weights[i : i + 1], chosen[i : i + 1]) for i in range(33)])
    assert torch.equal(together, alone)
