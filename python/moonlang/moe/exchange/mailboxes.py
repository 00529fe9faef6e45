"""An exchange over the mailboxes of the kernels, whoever carries their messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from sgl_kernel.exchange import Exchange, Mailboxes
from sgl_kernel.ranks import RankLostError
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.kernels.expert_weights import native
from moonlang.moe.exchange.port import Arrived, ExchangeSpec
from moonlang.moe.placement import Placement


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RankLostError as lost:
        raise PeerError(f"{lost}.", hint="The experts are spread over all ranks: start the server again.") from None


class MailboxExchange:
    """See ExpertExchange. A token travels once to a rank, however many of its experts are there."""

    def __init__(self, spec: ExchangeSpec, boxes: Sequence[Mailboxes], close: Callable[[], None] | None = None) -> None:
        """boxes: of each lane. close: what to do at the end."""
        self.native: Sequence[Any] = [Exchange(one, spec.payload) for one in boxes]
        self.most_tokens: int = self.native[0].most_tokens(spec.row_bytes, spec.per_token)
        self._close = close
        self._like = torch.empty(0)

    def dispatch(self, x: Tensor, experts: Tensor, placement: Placement) -> Arrived:
        exchange = self.native[0]
        with _peers():
            exchange.dispatch(x.contiguous(), experts.int(), native(placement))
            begin = exchange.arrived()
        rows = x.new_empty(begin[-1], x.shape[1])
        exchange.rows(rows)
        self._like = x
        return Arrived(rows, [last - first for first, last in pairwise(begin)])

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        y = torch.empty_like(self._like)
        with _peers():
            self.native[0].give_back(outputs.contiguous())
            self.native[0].combine(weights.contiguous(), y)
        return y

    def close(self) -> None:
        self.native = []
        if self._close is not None:
            self._close()
