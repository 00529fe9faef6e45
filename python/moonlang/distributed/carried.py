"""What the kernels of a program need of a group that is not theirs: every exchange is an all_gather."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.base.errors import PeerError
from moonlang.distributed.group import Group

_PART_BYTES = 4 << 20


def carried(group: Group) -> Any:
    """See Group.native; None when the CPU kernels are not installed."""
    try:
        from sgl_kernel.ranks import CarriedRanks, RankLostError
    except ImportError:
        return None

    owner = weakref.ref(group)  # which holds what is made here
    rank = group.rank

    def carry(parts: list[NDArray[np.uint8]]) -> None:
        try:
            group = owner()
            if group is None:
                raise PeerError("The group is closed.")
            found = group.all_gather(torch.from_numpy(parts[rank]))
        except PeerError as lost:
            raise RankLostError(lost.message) from lost
        for other, part in enumerate(parts):
            if other != rank:
                part[:] = found[other].numpy()

    return CarriedRanks(rank, group.size, part_bytes=_PART_BYTES, carry=carry)
