"""The experts of a layer against one token and one expert at a time."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from expert_exchanges import join, open_exchange, seat
from rank_threads import on_every_rank

from moonlang.config.shard import Shard
from moonlang.moe.exchange.port import ExchangeSpec
from moonlang.moe.experts import Experts


def filled(dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(0)
    experts = Experts(5, 24, 16, act="silu", dtype=dtype)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return experts


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weights = torch.randn(tokens, 24), torch.rand(tokens, 3)
    return x, weights, torch.stack([torch.randperm(5)[:3] for _ in range(tokens + 1)])[:tokens]


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


def test_ranks_with_tokens_of_their_own(tmp_path: Path) -> None:
    """Different numbers of them, none, and more than travel at a time: each gets what one that holds all would give."""
    whole, counts = filled(), [(3, 0), (0, 700), (0, 0), (5, 5)]
    given = [[batch(count) for count in pair] for pair in counts]

    def work(rank: int) -> list[torch.Tensor]:
        place = seat(tmp_path, rank, 2)
        experts = Experts(5, 24, 16, act="silu", dtype=torch.float32, shard=Shard(rank, 2))
        held = torch.tensor(experts.held)
        experts.gate_up_proj.copy_(whole.gate_up_proj[held])
        experts.down_proj.copy_(whole.down_proj[held])
        spec = ExchangeSpec(experts=5, per_token=3, columns=24, dtype=torch.float32)
        experts.group, experts.own_tokens = join(place), True
        experts.exchange = open_exchange("torch", spec, place, experts.group)
        found = [experts(*pair[rank]) for pair in given]
        experts.group.barrier()
        experts.exchange.close()
        return found

    for rank, found in enumerate(on_every_rank(2, work)):
        for got, pair in zip(found, given, strict=True):
            x = pair[rank][0]
            assert torch.equal(got, whole(*pair[rank]) if len(x) else x)
