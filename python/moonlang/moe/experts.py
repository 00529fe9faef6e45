"""The experts of one layer: gated feed-forward networks, each applied to the tokens that chose it.

Tensor-parallel ranks share them: each holds some of the experts, whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moonlang.config.shard import WHOLE, Shard
from moonlang.distributed.group import Group
from moonlang.layers.activation import activation
from moonlang.layers.linear import project


class Experts(nn.Module):
    """gate_up_proj: [E, 2F, M], gate above up; down_proj: [E, M, F]. Uninitialised until a loader fills them.

    count: of all ranks; part: the experts of this one, which are the E of its weights. group: the ranks, set when the
    model is complete; None while there is one.
    """

    group: Group | None = None

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
        tokens, chosen = experts.shape
        slots = experts.flatten().sort(stable=True).indices  # (token, place in its list) pairs, grouped by expert
        counts = experts.flatten().bincount(minlength=self.count).tolist()
        outputs = x.new_zeros(tokens * chosen, x.shape[1])
        for expert, group in enumerate(slots.split(counts)):
            if len(group) and expert in self.part:
                outputs[group] = self._one(expert - self.part.start, x[group // chosen])
        if self.group is not None:
            outputs = self.group.all_reduce(outputs)  # one rank has a row, the others zeros: nothing is rounded
        terms = outputs.view(tokens, chosen, -1).float() * weights.unsqueeze(-1)
        total = terms[:, 0]
        for place in range(1, chosen):
            total = total + terms[:, place]
        return total.to(x.dtype)

    def _one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_up_proj[expert]).chunk(2, -1)
        return project(self._act(gate).mul_(up), self.down_proj[expert])
