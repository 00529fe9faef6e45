"""A group over torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.base.route import own_address
from moonlang.core.seat import Seat
from moonlang.distributed.carried import carried
from moonlang.distributed.group import tree_sum

dist: Any = torch.distributed  # its type stubs know less than its documentation

_JOIN_S = 60.0
_TCP = "tcp://"
_INTERFACE = "GLOO_SOCKET_IFNAME"  # where the user says which one, gloo reads it


class TorchGroup:
    """See Group. Sums are made of gathered parts in the order of the tree, so every backend gives the same bits."""

    def __init__(self, seat: Seat, backend: str, store: Any = None, name: str = "") -> None:
        """store: where the ranks have found each other before; name: of this group among those over one store."""
        self.rank, self.size = seat.rank, seat.size
        self.native = carried(self) if backend == "gloo" else None
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        self._seat, self._backend = seat, backend
        patience = timedelta(seconds=seat.patience_s)
        with _peers():
            self._store = _store(seat) if store is None else store
            self._group = _BACKENDS[backend](dist.PrefixStore(seat.part + name + backend, self._store), seat, patience)

    @staticmethod
    def over(backend: str) -> Callable[[Seat], TorchGroup]:
        return lambda seat: TorchGroup(seat, backend)

    def another(self, name: str) -> TorchGroup:
        """A group of the same ranks, in which others may wait for each other at the same time."""
        return TorchGroup(self._seat, self._backend, self._store, name)

    def all_reduce(self, x: Tensor) -> Tensor:
        return tree_sum(self.all_gather(x))

    def all_gather(self, x: Tensor) -> Tensor:
        given = self._there(x)
        found = [torch.empty_like(given) for _ in range(self.size)]
        with _peers():
            self._group.allgather([found], [given]).wait()
        return torch.stack(found).to(x.device)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """parts[r]: [n, ...] is for rank r; what the others had for this one, by rank. Lengths may all differ."""
        given = torch.cat(list(parts))
        sent = [len(part) for part in parts]
        asked = self._there(torch.tensor(sent))
        told = torch.empty_like(asked)
        with _peers():
            self._group.alltoall_base(told, asked, [], []).wait()
        received = told.tolist()
        found = given.new_empty(sum(received), *given.shape[1:], device=told.device)
        self.all_to_all_single(found, self._there(given), received, sent)
        return list(found.to(given.device).split(received))

    def all_to_all_single(self, found: Tensor, given: Tensor, received: list[int], sent: list[int]) -> None:
        """Rows of `given` for each rank, into `found`, when all know how many there are."""
        with _peers():
            self._group.alltoall_base(found, given, received, sent).wait()

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


def abandon(seat: Seat) -> None:
    """Nothing can be done for those who wait there: they give up after a minute."""


def _store(seat: Seat) -> Any:
    """Where the ranks find each other's addresses."""
    if not seat.meeting.startswith(_TCP):
        return dist.FileStore(seat.path, seat.size)
    host, port = _split(seat.meeting)
    patience = timedelta(seconds=_JOIN_S)
    if seat.part:  # all ranks have made the store; some of them meet in it again
        return dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
    return dist.TCPStore(host, port, seat.size, is_master=seat.rank == 0, timeout=patience)


def _split(meeting: str) -> tuple[str, int]:
    """Host and port of a "tcp://host:port"."""
    host, _, port = meeting.removeprefix(_TCP).rpartition(":")
    return host.strip("[]"), int(port)


def _gloo(store: Any, seat: Seat, patience: timedelta) -> Any:
    if not seat.meeting.startswith(_TCP) or os.environ.get(_INTERFACE):
        return dist.ProcessGroupGloo(store, seat.rank, seat.size, patience)
    try:  # by itself gloo takes what the host's name stands for: often a loopback address that nobody else reaches
        address = own_address(*_split(seat.meeting))
    except OSError as error:
        raise PeerError(f"{seat.meeting} is out of reach: {error}.") from error
    options = dist.ProcessGroupGloo._Options()
    options._timeout = patience
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, seat.rank, seat.size, options)


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
