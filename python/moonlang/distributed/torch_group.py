"""A group over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat
from moonlang.distributed.carried import carried
from moonlang.distributed.group import tree_sum

dist: Any = torch.distributed  # its type stubs know less than its documentation

_JOIN_S = 60.0
_TCP = "tcp://"


class TorchGroup:
    """See Group. Sums are made of gathered parts in the order of the tree, so every backend gives the same bits."""

    def __init__(self, seat: Seat, backend: str) -> None:
        self.rank, self.size = seat.rank, seat.size
        self.native = carried(self) if backend == "gloo" else None
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        patience = timedelta(seconds=seat.patience_s)
        with _peers():
            self._store = _store(seat)
            self._group = _BACKENDS[backend](dist.PrefixStore(backend, self._store), seat, patience)

    @staticmethod
    def over(backend: str) -> Callable[[Seat], TorchGroup]:
        return lambda seat: TorchGroup(seat, backend)

    def all_reduce(self, x: Tensor) -> Tensor:
        return tree_sum(self.all_gather(x))

    def all_gather(self, x: Tensor) -> Tensor:
        given = self._there(x)
        found = [torch.empty_like(given) for _ in range(self.size)]
        with _peers():
            self._group.allgather([found], [given]).wait()
        return torch.stack(found).to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        found = self._there(x).clone()
        with _peers():
            self._group.broadcast(found, 0).wait()
        return found.to(x.device)

    def barrier(self) -> None:
        with _peers():
            self._group.barrier().wait()

    def close(self) -> None:
        del self._group

    def _there(self, x: Tensor) -> Tensor:
        """x where the backend can take it."""
        return x.detach().contiguous() if self._device is None else x.detach().to(self._device).contiguous()


def _store(seat: Seat) -> Any:
    """Where the ranks find each other's addresses."""
    if not seat.meeting.startswith(_TCP):
        return dist.FileStore(seat.meeting, seat.size)
    host, _, port = seat.meeting.removeprefix(_TCP).rpartition(":")
    return dist.TCPStore(
        host.strip("[]"), int(port), seat.size, is_master=seat.rank == 0, timeout=timedelta(seconds=_JOIN_S)
    )


def _gloo(store: Any, seat: Seat, patience: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, seat.rank, seat.size, patience)


def _nccl(store: Any, seat: Seat, patience: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = patience
    return dist.ProcessGroupNCCL(store, seat.rank, seat.size, options)


_BACKENDS = {"gloo": _gloo, "nccl": _nccl}


@contextmanager
def _peers() -> Iterator[None]:
    """torch.distributed reports a lost peer as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"A rank is lost: {error}.", hint="The model is spread over all ranks: start the server again."
        ) from error
