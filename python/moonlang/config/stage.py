"""Which layers of a model one stage of a pipeline computes. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """Stage `rank` of `size`. The first one knows the input ids, the last one has the head; each hands the hidden
    states of all tokens to the next."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def layers(self, total: int) -> range:
        """Of `total` layers; stages differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)


ALONE = Stage()
