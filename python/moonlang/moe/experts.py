"""The experts of one layer: gated feed-forward networks, each applied to the tokens that chose it.

Tensor-parallel ranks share them: each holds some of the experts, whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonlang.config.shard import WHOLE, Shard
from moonlang.distributed.group import Group
from moonlang.layers.activation import activation
from moonlang.layers.linear import project
from moonlang.moe.exchange.port import ExpertExchange, weighted_sum


class Experts(nn.Module):
    """gate_up_proj: [E, 2F, M], gate above up; down_proj: [E, M, F]. Uninitialised until a loader fills them.

    count: of all ranks; part: the experts of this one, which are the E of its weights. group: the ranks, set when the
    model is complete; None while there is one. exchange: what carries tokens between them; None: all have all tokens.
    own_tokens: each has others, or none, and all make the same calls nevertheless. peers: ranks that have the same,
    equally many for every rank.
    """

    group: Group | None = None
    exchange: ExpertExchange | None = None
    own_tokens = False
    peers: Group | None = None

    def __init__(
        self, count: int, size: int, inner: int, *, act: str, dtype: torch.dtype, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        self.count, self.part = count, shard.part(count)
        held = len(self.part)
        self.gate_up_proj = nn.Parameter(torch.empty(held, 2 * inner, size, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(held, size, inner, dtype=dtype), requires_grad=False)
        self.act = act
        self._act = activation(act)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x: [T, M], weights: [T, X] float32, experts: [T, X] int64 -> [T, M], the weighted sum over a token's experts.

        The sum is in float32 in the order of the token's list, so it does not depend on the other tokens.
        """
        if self.group is not None and self.exchange is not None:
            return self._exchanged(x, weights, experts, self.group, self.exchange)
        tokens, chosen = experts.shape
        slots = experts.flatten().sort(stable=True).indices  # (token, place in its list) pairs, grouped by expert
        counts = experts.flatten().bincount(minlength=self.count).tolist()
        outputs = x.new_zeros(tokens * chosen, x.shape[1])
        for expert, group in enumerate(slots.split(counts)):
            if len(group) and expert in self.part:
                outputs[group] = self._one(expert - self.part.start, x[group // chosen])
        if self.group is not None:
            outputs = self.group.all_reduce(outputs)  # one rank has a row, the others zeros: nothing is rounded
        return weighted_sum(outputs.view(tokens, chosen, -1), weights)

    def _exchanged(self, x: Tensor, weights: Tensor, experts: Tensor, group: Group, exchange: ExpertExchange) -> Tensor:
        """Each rank sees to its share of the tokens, and gets the results of all."""
        if self.own_tokens:
            return self._owned(x, weights, experts, group, exchange)
        results = []
        for first in range(0, len(x), step := exchange.most_tokens * group.size):
            own = Shard(group.rank, group.size).part(len(x[first : first + step]))
            mine = slice(first + own.start, first + own.stop)
            found = self._travelled(x[mine], weights[mine], experts[mine], exchange)
            results.append(gathered(found, len(x[first : first + step]), group))
        return torch.cat(results)

    def _owned(self, x: Tensor, weights: Tensor, experts: Tensor, group: Group, exchange: ExpertExchange) -> Tensor:
        """Each rank sees to its own tokens, or its share of those that it has in common with peers; one that has fewer
        than others takes part without any."""
        peers = self.peers
        share = Shard() if peers is None else Shard(peers.rank, peers.size)
        most, step = int(group.all_gather(torch.tensor(len(x))).max()), exchange.most_tokens * share.size
        results = [x[:0]]
        for first in range(0, most, step):
            total = len(x[first : first + step])
            own = share.part(total)
            mine = slice(first + own.start, first + own.stop)
            found = self._travelled(x[mine], weights[mine], experts[mine], exchange)
            results.append(found if peers is None else gathered(found, total, peers))
        return torch.cat(results)

    def _travelled(self, x: Tensor, weights: Tensor, experts: Tensor, exchange: ExpertExchange) -> Tensor:
        """These tokens there and back, and meanwhile those of others."""
        arrived = exchange.dispatch(x, experts)
        parts = [
            self._one(slot, rows) if len(rows) else rows for slot, rows in enumerate(arrived.rows.split(arrived.counts))
        ]
        return exchange.combine(torch.cat(parts), weights)

    def _one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_up_proj[expert]).chunk(2, -1)
        return project(self._act(gate).mul_(up), self.down_proj[expert])


def gathered(mine: Tensor, total: int, group: Group) -> Tensor:
    """mine: [n, M], this rank's share of `total` rows -> [total, M] on every rank."""
    widest = -(-total // group.size)
    parts = group.all_gather(F.pad(mine, (0, 0, 0, widest - len(mine))))
    shares = [len(Shard(rank, group.size).part(total)) for rank in range(group.size)]
    return torch.cat([part[:count] for part, count in zip(parts, shares, strict=True)])
