"""A rank's place among those who compute one model together."""

from __future__ import annotations

import msgspec


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Rank `rank` of `size`, in a pipeline of `stages`: the first ranks compute the first layers.

    replicas: the ranks are those of so many copies of the model, which share its experts and nothing else; the first
    ranks are the first copy. The first rank of each plans for it.

    meeting: where the ranks exchange numbers: the path of a file that is theirs alone (one host), or
    "tcp://host:port". part: the name of these ranks, when they are some of all that meet there. plans: where the
    first rank of a copy hands out its plans: the path of a socket, or "tcp://host:port". results: like plans, where
    with several stages rank 0 gets results. bells: the beginning of paths, over which copies that share experts wake
    each other. patience_s: how long a rank that lives is waited for. local_size: ranks on this host, those that are
    none of these too. first: rank among all of the first of these.
    """

    rank: int
    size: int
    meeting: str
    plans: str
    backend: str
    stages: int = 1
    replicas: int = 1
    part: str = ""
    patience_s: float = 300.0
    local_size: int = 1
    results: str = ""
    bells: str = ""
    first: int = 0

    @property
    def path(self) -> str:
        """A file of these ranks alone, when they meet on one host."""
        return f"{self.meeting}-{self.part}" if self.part else self.meeting

    @property
    def within_host(self) -> bool:
        """Whether all of these ranks are on one host."""
        return self.first // self.local_size == (self.first + self.size - 1) // self.local_size

    def of_stage(self) -> Seat:
        """This rank's place among those that compute the same layers."""
        each = self.size // self.stages
        stage, rank = divmod(self.rank, each)
        part = f"stage{stage}"
        return msgspec.structs.replace(self, rank=rank, size=each, stages=1, part=part, first=stage * each)

    @property
    def replica_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.size // self.replicas

    @property
    def replica(self) -> int:
        """The copy that this rank is of."""
        return self.rank // self.replica_size

    @property
    def place(self) -> int:
        """The number of this rank among those of its copy that are on this host."""
        return self.rank % self.replica_size % self.local_size

    @property
    def chooses(self) -> bool:
        """Whether this rank chooses the tokens: the first of the last stage."""
        return self.rank == self.size - self.size // self.stages
