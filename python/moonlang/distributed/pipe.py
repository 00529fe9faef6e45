"""What a rank of one stage of a pipeline knows of the others. Hidden states go from stage to stage, rank to rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moonlang.distributed.group import Group


@dataclass(frozen=True, slots=True)
class Pipe:
    """Neighbours are groups of two, of which the earlier stage is rank 0; None where there is no neighbour.

    A stage that hands over is free to go on when the next one has begun to take: one batch is on its way at most.
    everyone: all ranks of all stages.
    """

    before: Group | None
    after: Group | None
    everyone: Group

    def take(self, room: Tensor) -> Tensor:
        """The hidden states of the stage before, of the shape and dtype of `room`."""
        if self.before is None:
            raise ValueError("The first stage takes input ids.")
        return self.before.broadcast(room)

    def give(self, states: Tensor) -> None:
        """Hand over to the next stage."""
        if self.after is None:
            raise ValueError("The last stage hands nothing over.")
        self.after.broadcast(states)
