"""The experts of one layer: gated feed-forward networks, each applied to the tokens that chose it.

Tensor-parallel ranks share them: each holds some of the experts, whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonlang.config.shard import WHOLE, Shard
from moonlang.distributed.group import Group
from moonlang.layers.activation import activation
from moonlang.layers.linear import project
from moonlang.moe.exchange.port import ExpertExchange, weighted_sum
from moonlang.moe.placement import Placement, even


class Experts(nn.Module):
    """gate_up_proj: [S, 2F, M], gate above up; down_proj: [S, M, F]. Uninitialised until a loader fills them.

    count: experts of all ranks; placement: where they are, so that `held` are those in the S slots of this rank.
    group: the ranks, set when the model is complete; None while there is one. exchange: what carries tokens between
    them; None: all have all tokens. own_tokens: each has others, or none, and all make the same calls nevertheless.
    peers: ranks that have the same, equally many for every rank. counts: [E], how often the tokens that this rank sees
    to have chosen each expert.
    """

    group: Group | None = None
    exchange: ExpertExchange | None = None
    own_tokens = False
    peers: Group | None = None

    def __init__(
        self,
        count: int,
        size: int,
        inner: int,
        *,
        act: str,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
        redundant: int = 0,
        slots_of: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """redundant: further copies of experts, which only ranks with an exchange may have. slots_of: by rank, the
        experts there; None: dealt out evenly."""
        super().__init__()
        self.count, self.rank = count, shard.rank
        self.placement = even(count, shard.size, redundant) if slots_of is None else Placement(tuple(slots_of))
        slots = len(self.held)
        self.gate_up_proj = nn.Parameter(torch.empty(slots, 2 * inner, size, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(slots, size, inner, dtype=dtype), requires_grad=False)
        self.counts = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.act = act
        self._act = activation(act)

    @property
    def held(self) -> tuple[int, ...]:
        """The experts in the slots of this rank."""
        return self.placement.slots[self.rank]

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x: [T, M], weights: [T, X] float32, experts: [T, X] int64 -> [T, M], the weighted sum over a token's experts.

        The sum is in float32 in the order of the token's list, so it does not depend on the other tokens.
        """
        if self.group is not None and self.exchange is not None:
            return self._exchanged(x, weights, experts, self.group, self.exchange)
        tokens, chosen = experts.shape
        slots = experts.flatten().sort(stable=True).indices  # (token, place in its list) pairs, grouped by expert
        counts = self._counted(experts).tolist()
        outputs = x.new_zeros(tokens * chosen, x.shape[1])
        slot_of = {expert: slot for slot, expert in enumerate(self.held)}
        for expert, group in enumerate(slots.split(counts)):
            if len(group) and expert in slot_of:
                outputs[group] = self._one(slot_of[expert], x[group // chosen])
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
        self._counted(experts)
        arrived = exchange.dispatch(x, experts, self.placement)
        parts = [
            self._one(slot, rows) if len(rows) else rows for slot, rows in enumerate(arrived.rows.split(arrived.counts))
        ]
        return exchange.combine(torch.cat(parts), weights)

    def _counted(self, experts: Tensor) -> Tensor:
        """How often each expert [E] is among those."""
        found = experts.flatten().bincount(minlength=self.count)
        if self.counts.device != found.device:
            self.counts = self.counts.to(found.device)
        self.counts += found
        return found

    def _one(self, slot: int, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_up_proj[slot]).chunk(2, -1)
        return project(self._act(gate).mul_(up), self.down_proj[slot])


def gathered(mine: Tensor, total: int, group: Group) -> Tensor:
    """mine: [n, M], this rank's share of `total` rows -> [total, M] on every rank."""
    widest = -(-total // group.size)
    parts = group.all_gather(F.pad(mine, (0, 0, 0, widest - len(mine))))
    shares = [len(Shard(rank, group.size).part(total)) for rank in range(group.size)]
    return torch.cat([part[:count] for part, count in zip(parts, shares, strict=True)])
