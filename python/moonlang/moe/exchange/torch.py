"""Tokens over torch.distributed: the reference, on every device that it has a backend for."""

from __future__ import annotations

from collections.abc import Sequence
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


class TorchExchange:
    """See ExpertExchange. Every (token, expert) pair is a row of its own; counts by expert travel ahead of the rows."""

    most_tokens = BOX_TOKENS

    def __init__(self, spec: ExchangeSpec, group: TorchGroup, native: Sequence[Any] = ()) -> None:
        self.native = native
        self._group = group
        self._experts = spec.experts
        self._parts = spec.held(group.size)
        self._order = self._by_expert = torch.empty(0, dtype=torch.int64)
        self._sent: list[int] = []
        self._received: list[int] = []

    def dispatch(self, x: Tensor, experts: Tensor) -> Arrived:
        pairs = experts.flatten()
        self._order = pairs.sort(stable=True).indices
        counts = pairs.bincount(minlength=self._experts)
        by_rank = counts.split([len(part) for part in self._parts])
        self._sent = [int(some.sum()) for some in by_rank]
        theirs = self._group.all_to_all(by_rank)
        self._received = [int(some.sum()) for some in theirs]
        rows = x[self._order // experts.shape[1]].split(self._sent)
        came = torch.cat(self._group.all_to_all(rows))
        held = torch.arange(len(theirs[0]), device=x.device)
        self._by_expert = torch.cat([held.repeat_interleave(some) for some in theirs]).sort(stable=True).indices
        return Arrived(came[self._by_expert], torch.stack(theirs).sum(0).tolist())

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        back = torch.empty_like(outputs)
        back[self._by_expert] = outputs
        returned = torch.cat(self._group.all_to_all(back.split(self._received)))
        z = torch.empty_like(returned)
        z[self._order] = returned
        return weighted_sum(z.view(*weights.shape, outputs.shape[1]), weights)

    def close(self) -> None:
        self._group.close()


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
        from sgl_kernel.exchange import CarriedMailboxes
    except ImportError:
        return []
    from moonlang.moe.exchange.mailboxes import lane

    return [
        lane(
            spec,
            CarriedMailboxes(group.rank, group.size, box_bytes=spec.box_bytes, post=carrier.post, take=carrier.take),
        )
        for carrier in [_Carrier(group) for _ in range(spec.lanes)]
    ]


def _open(spec: ExchangeSpec, seat: Seat, group: Group) -> TorchExchange:
    if isinstance(group, TorchGroup):
        joined = group.another("experts-")
    else:  # ranks of one host, which meet in shared memory otherwise
        joined = TorchGroup(msgspec.structs.replace(seat, meeting=f"{seat.meeting}-experts"), "gloo")
    return TorchExchange(spec, joined, _native(spec, joined) if seat.backend != "nccl" else ())


def check(spec: ExchangeSpec) -> None:
    """torch is always there."""


BACKEND = _open
