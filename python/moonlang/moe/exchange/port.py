"""What a layer of experts needs of those who carry its tokens, and how a backend is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.moe.placement import Placement, even

BOX_TOKENS = 512  # of a rank: the most that travel at a time
_MOST_BOX_BYTES = 8 << 20  # unless a token is larger; every pair of ranks has two boxes
_LINE = 64


class Arrived(NamedTuple):
    """Rows [N, M] for the slots of this rank, those of the first one first; counts: how many there are for each."""

    rows: Tensor
    counts: list[int]


class ExpertExchange(Protocol):
    """Carries the tokens of one layer of experts at a time. All ranks make the same calls in the same order.

    Every rank has tokens of its own. Methods raise PeerError when a rank has ended or does not answer; the exchange is
    of no use then.
    """

    most_tokens: int
    """That a rank may dispatch at a time."""
    native: Sequence[Any]
    """The same for the kernels of a program: as many `sgl_kernel.exchange.Exchange` as halves of a batch may be under
    way at a time. Empty: a program cannot use this backend."""

    def dispatch(self, x: Tensor, experts: Tensor, placement: Placement) -> Arrived:
        """x: [T, M] goes to experts: [T, X] int64; what came from all ranks is returned. placement: where the experts
        are, on all ranks equal; copies of one take turns."""
        ...

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """outputs: [N, M], what became of the arrived rows; weights: [T, X] float32 -> [T, M].

        A token's terms are added in float32 in the order of its list: nothing depends on where its experts are.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSpec:
    """What travels. experts: of a layer; per_token: experts of a token; columns: M; lanes: halves of a batch under way
    at a time; devices: network cards, as --mooncake-ib-device names them; payload: in what form rows travel to
    their experts, "plain" or "int8", where the backend is able to."""

    experts: int
    per_token: int
    columns: int
    dtype: torch.dtype
    lanes: int = 1
    devices: str | None = None
    payload: str = "plain"

    @property
    def row_bytes(self) -> int:
        """Of a token."""
        return self.columns * self.dtype.itemsize

    @property
    def box_bytes(self) -> int:
        """Of the largest message: all experts of all tokens of a round may be on one rank."""
        each = self.per_token * (self.row_bytes + _LINE) + _LINE
        return max(1, min(BOX_TOKENS, _MOST_BOX_BYTES // each)) * each


Open = Callable[[ExchangeSpec, Seat, Group], ExpertExchange | None]
"""(what travels, this rank, all of them) -> None: nothing has to travel, since all ranks have all tokens.

ConfigError when the backend does not work here; PeerError when the others cannot be reached."""


def weighted_sum(z: Tensor, weights: Tensor) -> Tensor:
    """z: [T, X, M], weights: [T, X] -> [T, M] of z's dtype, added in float32 in the order of the list."""
    terms = z.float() * weights.unsqueeze(-1)
    total = terms[:, 0]
    for place in range(1, terms.shape[1]):
        total = total + terms[:, place]
    return total.to(z.dtype)


def check_ways(exchange: ExpertExchange, spec: ExchangeSpec, group: Group) -> None:
    """Send a row from every rank to every other and back, before weights are loaded. PeerError: some way is closed."""
    placement = even(spec.experts, group.size)
    experts = torch.tensor([[held[0]] * spec.per_token for held in placement.slots])
    x = torch.arange(group.size).unsqueeze(1).expand(-1, spec.columns).to(spec.dtype) + group.rank
    arrived = exchange.dispatch(x, experts, placement)
    weights = torch.zeros(group.size, spec.per_token)
    weights[:, 0] = 1
    tolerance = 0.01 if spec.payload == "int8" else 0
    if not torch.allclose(exchange.combine(arrived.rows, weights).float(), x.float(), rtol=tolerance, atol=0):
        raise PeerError("What the ranks send each other does not arrive as it was sent.", hint="Is the network sound?")
    group.barrier()
