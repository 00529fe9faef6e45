from numpy import uint8
from numpy.typing import NDArray

class RankLostError(RuntimeError):
    """A rank has ended, or has not answered in time."""

class Ranks:
    """See cpp/base/ranks.h. Every rank calls `exchange` equally often; parts are read before the next but one."""

    rank: int
    size: int
    part_bytes: int
    def __init__(self, path: str, rank: int, size: int, *, part_bytes: int, patience_ms: int, spin_us: int) -> None: ...
    def exchange(self) -> None: ...
    def mine(self) -> NDArray[uint8]:
        """Where this rank's part of the next exchange goes."""

    def part(self, rank: int) -> NDArray[uint8]:
        """A rank's part of the last exchange."""
