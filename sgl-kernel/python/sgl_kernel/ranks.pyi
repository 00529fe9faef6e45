from collections.abc import Callable

from numpy import uint8
from numpy.typing import NDArray

class RankLostError(RuntimeError):
    """A rank has ended, or has not answered in time."""

class Ranks:
    """See cpp/base/ranks.h. Every rank calls `exchange` equally often; parts are read before the next but one."""

    rank: int
    size: int
    part_bytes: int
    def exchange(self, count: int) -> None:
        """Give the first `count` bytes of `mine` to all ranks, and get theirs."""

    def mine(self) -> NDArray[uint8]:
        """Where this rank's part of the next exchange goes."""

    def part(self, rank: int) -> NDArray[uint8]:
        """A rank's part of the last exchange."""

class SharedRanks(Ranks):
    """Ranks of one host, over memory that all map. See cpp/base/shared_ranks.h."""

    def __init__(self, path: str, rank: int, size: int, *, part_bytes: int, patience_ms: int, spin_us: int) -> None: ...

class CarriedRanks(Ranks):
    """Ranks anywhere. carry: gets the parts of all ranks as arrays [bytes]; its own is full, the others it fills."""

    def __init__(
        self, rank: int, size: int, *, part_bytes: int, carry: Callable[[list[NDArray[uint8]]], None]
    ) -> None: ...
