"""Ranks of one host: every rank writes its part into memory that all have mapped, and reads the parts of all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from sgl_kernel.ranks import RankLostError, SharedRanks
from torch import Tensor

from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat
from moonlang.distributed.group import tree_sum

_PART_BYTES = 8 << 20  # memory is taken as it is used
_SPIN_US = 50


class SharedMemoryGroup:
    """See Group. A rank that has ended is noticed within 100 ms."""

    def __init__(self, seat: Seat) -> None:
        self.rank, self.size = seat.rank, seat.size
        # Who spins keeps the core from who computes.
        spin_us = _SPIN_US if len(os.sched_getaffinity(0)) >= seat.local_size else 0
        patience_ms = int(seat.patience_s * 1000)
        self.native = SharedRanks(
            seat.path, seat.rank, seat.size, part_bytes=_PART_BYTES, patience_ms=patience_ms, spin_us=spin_us
        )
        self.barrier()
        if seat.rank == 0:
            Path(seat.path).unlink()  # nobody else will look for it: the memory goes with the last process

    def all_reduce(self, x: Tensor) -> Tensor:
        return tree_sum(self.all_gather(x))

    def all_gather(self, x: Tensor) -> Tensor:
        given = x.detach().cpu().contiguous()
        mine = given.reshape(-1).view(torch.uint8).numpy()
        found = np.empty((self.size, mine.size), np.uint8)
        for begin in range(0, mine.size, self.native.part_bytes):
            end = min(mine.size, begin + self.native.part_bytes)
            self.native.mine()[: end - begin] = mine[begin:end]
            self._exchange(end - begin)
            for rank in range(self.size):
                found[rank, begin:end] = self.native.part(rank)[: end - begin]
        return torch.from_numpy(found).view(given.dtype).view(self.size, *given.shape).to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        given = x.detach().cpu().contiguous()
        found = given if self.rank == 0 else torch.empty_like(given)
        content = found.reshape(-1).view(torch.uint8).numpy()
        for begin in range(0, content.size, self.native.part_bytes):
            end = min(content.size, begin + self.native.part_bytes)
            if self.rank == 0:
                self.native.mine()[: end - begin] = content[begin:end]
            self._exchange(end - begin)
            if self.rank != 0:
                content[begin:end] = self.native.part(0)[: end - begin]
        return found.to(x.device)

    def barrier(self) -> None:
        self._exchange(0)

    def close(self) -> None:
        """Nothing: the memory goes with the process, or with the last reference."""

    def _exchange(self, count: int) -> None:
        try:
            self.native.exchange(count)
        except RankLostError as lost:
            raise PeerError(f"{lost}.", hint="The model is spread over all ranks: start the server again.") from None


def abandon(seat: Seat) -> None:
    """Come where ranks meet, and leave at once: whoever waits there for this one hears that it has ended."""
    SharedRanks(seat.path, seat.rank, seat.size, part_bytes=_PART_BYTES, patience_ms=0, spin_us=0)


BACKEND = SharedMemoryGroup
