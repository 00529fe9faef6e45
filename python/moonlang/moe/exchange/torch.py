"""Tokens over torch.distributed: the reference, on every device that it has a backend for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import torch
from numpy.typing import NDArray
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.distributed.torch_group import TorchGroup
from moonlang.moe.exchange.port import BOX_TOKENS, Arrived, ExchangeSpec, weighted_sum
from moonlang.moe.placement import Placement


class TorchExchange:
    """See ExpertExchange. Every (token, expert) pair is a row of its own; counts by slot travel ahead of the rows."""

    most_tokens = BOX_TOKENS

    def __init__(self, group: TorchGroup, native: Sequence[Any] = ()) -> None:
        self.native = native
        self._group = group
        self._order = self._by_slot = torch.empty(0, dtype=torch.int64)
        self._sent: list[int] = []
        self._received: list[int] = []

    def dispatch(self, x: Tensor, experts: Tensor, placement: Placement) -> Arrived:
        slots = _slots(experts.flatten(), placement, self._group.rank)
        self._order = slots.sort(stable=True).indices
        sizes = [len(held) for held in placement.slots]
        by_rank = slots.bincount(minlength=sum(sizes)).split(sizes)
        self._sent = [int(some.sum()) for some in by_rank]
        theirs = self._group.all_to_all(by_rank)
        self._received = [int(some.sum()) for some in theirs]
        rows = x[self._order // experts.shape[1]].split(self._sent)
        came = torch.cat(self._group.all_to_all(rows))
        held = torch.arange(len(theirs[0]), device=x.device)
        self._by_slot = torch.cat([held.repeat_interleave(some) for some in theirs]).sort(stable=True).indices
        return Arrived(came[self._by_slot], torch.stack(theirs).sum(0).tolist())

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        back = torch.empty_like(outputs)
        back[self._by_slot] = outputs
        returned = torch.cat(self._group.all_to_all(back.split(self._received)))
        z = torch.empty_like(returned)
        z[self._order] = returned
        return weighted_sum(z.view(*weights.shape, outputs.shape[1]), weights)

    def close(self) -> None:
        self._group.close()


def _slots(experts: Tensor, placement: Placement, turn: int) -> Tensor:
    """experts: [N] -> [N] slots, counted over the slots of all ranks. turn: of the copy that comes first."""
    table, numbers = _table(placement, experts.device)
    order = experts.sort(stable=True)
    begins = torch.searchsorted(order.values, order.values)  # where the tokens of the same expert begin
    turns = torch.empty_like(experts)
    turns[order.indices] = torch.arange(len(experts), device=experts.device) - begins + turn
    return table[experts, turns % numbers[experts]]


@lru_cache(maxsize=512)
def _table(placement: Placement, device: torch.device) -> tuple[Tensor, Tensor]:
    """By expert, the slots of its copies [E, most], and how many there are [E]."""
    firsts = [0, *accumulate(len(held) for held in placement.slots)]
    copies = [[firsts[copy.rank] + copy.slot for copy in found] for found in placement.all_copies()]
    widest = max(len(found) for found in copies)
    filled = [found + found[:1] * (widest - len(found)) for found in copies]
    return torch.tensor(filled, device=device), torch.tensor([len(found) for found in copies], device=device)


class _Carrier:
    """Carries the messages of one exchange of a program."""

    def __init__(self, group: TorchGroup) -> None:
        self._group = group
        self._came: list[Tensor] = []

    def post(self, letters: list[NDArray[Any] | None]) -> None:
        from sgl_kernel.ranks import RankLostError

        nothing = torch.empty(0, dtype=torch.uint8)
        try:
            self._came = self._group.all_to_all([nothing if x is None else torch.from_numpy(x) for x in letters])
        except PeerError as lost:
            raise RankLostError(lost.message) from lost

    def take(self, sender: int) -> NDArray[Any]:
        return self._came[sender].numpy()


def _native(spec: ExchangeSpec, group: TorchGroup) -> list[Any]:
    """For the kernels, when they are installed."""
    try:
        from sgl_kernel.exchange import CarriedMailboxes, Exchange
    except ImportError:
        return []
    carriers = [_Carrier(group) for _ in range(spec.lanes)]
    boxes = [
        CarriedMailboxes(group.rank, group.size, box_bytes=spec.box_bytes, post=carrier.post, take=carrier.take)
        for carrier in carriers
    ]
    return [Exchange(one, spec.payload) for one in boxes]


def _open(spec: ExchangeSpec, seat: Seat, group: Group) -> TorchExchange:
    if isinstance(group, TorchGroup):
        joined = group.another("experts-")
    else:  # ranks of one host, which meet in shared memory otherwise
        place = msgspec.structs.replace(seat, meeting=f"{seat.meeting}-experts")
        joined = TorchGroup(place, "gloo")
        joined.barrier()
        if seat.rank == 0:  # all have met: nobody else will look for it, and it would stay after a crash
            Path(place.path).unlink(missing_ok=True)
    return TorchExchange(joined, _native(spec, joined) if seat.backend != "nccl" else ())


def check(spec: ExchangeSpec) -> None:
    """torch is always there."""


BACKEND = _open
