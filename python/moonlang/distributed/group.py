"""What a group of ranks can do together. A backend is a file of this package: shared_memory, gloo, nccl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from moonlang.core.seat import Seat


class Group(Protocol):
    """Collectives over the ranks of one group. All ranks call the same ones in the same order with the same shapes.

    Every method raises PeerError when a rank has ended or does not answer; the group is of no use then.
    """

    rank: int
    size: int
    native: Any
    """What kernels reduce with inside a program (`sgl_kernel.ranks.Ranks`), or None."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, of x's shape and dtype: ranks are added as a binary tree, in this dtype."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: what each rank gave."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """What rank 0 gave; the others give a tensor of the same shape and dtype."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        ...

    def close(self) -> None: ...


Join = Callable[[Seat], Group]


def tree_sum(parts: Tensor) -> Tensor:
    """parts: [n, ...], n a power of two -> [...], added as ((0 + 1) + (2 + 3)) + ..."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]
