"""Who is left of the ranks of one host, and how those agree on it, without a coordinator.

Each rank sees the processes of the others end, and what has ended never comes back: so all come to know the same. They
agree by signing, each in a file of its own, the list of those that they see left, until all of one list have signed it.
"""

from __future__ import annotations

import os
import select
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from moonlang.base import log, registry
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group

_LOOK_S = 0.001
_GRACE_S = 30.0  # a busy machine takes its time to come

_log = log.get(__name__)

Ranks = tuple[int, ...]
Choose = Callable[[Ranks], Ranks]


def everyone(left: Ranks) -> Ranks:
    """All go on."""
    return left


def largest_tree(left: Ranks) -> Ranks:
    """The first 8, 4, 2 or 1 of those that are left: so many as sums over ranks can be a tree of."""
    return left[: 1 << len(left).bit_length() - 1]


class Survivors:
    """The others of a group, as rank `seat.rank` sees them.

    members: the ranks that compute together now, of `first_size` that there were. seat: this rank's place among them;
    None when it is not needed.
    """

    def __init__(self, seat: Seat, group: Group, choose: Choose = everyone) -> None:
        """All ranks make theirs at the same time. choose: who of those left go on. PeerError: one has ended."""
        self.seat: Seat | None = seat
        self.members: Ranks = tuple(range(seat.size))
        self.first_size = seat.size
        self._first = seat
        self._choose = choose
        self._agreed = self.members
        self._times = Counter([self.members])
        self._signed = ""
        self._abandoned: list[str] = []
        self._killed: list[int] = []
        self._epoll = select.epoll()
        self._processes: dict[int, int] = {}
        for rank, pid in enumerate(group.all_gather(torch.tensor(os.getpid())).tolist()):
            if rank != seat.rank:
                self._watch(rank, pid)
        group.barrier()  # all watch all: from now on nobody can end unseen

    def fileno(self) -> int:
        """Readable when a rank has ended and nobody has looked since."""
        return self._epoll.fileno()

    def left(self) -> Ranks:
        """The ranks whose processes live, by what is known now."""
        ended = {fd for fd, _ in self._epoll.poll(0)}
        for rank, process in list(self._processes.items()):
            if process in ended:
                _log.error("Rank %d has ended.", rank)
                self._epoll.unregister(process)
                os.close(process)
                del self._processes[rank]
        return tuple(sorted((self._first.rank, *self._processes)))

    @property
    def shrunk(self) -> bool:
        """Whether one has ended since they last agreed."""
        return self.left() != self._agreed

    @property
    def broken(self) -> bool:
        """Whether one of those that compute together has ended."""
        return not set(self.members) <= set(self.left())

    def agree(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all that are left see the same ones left, and take one's place; False when told to `stop`.

        All of them call this, when they have given up what they had in common. One that does not come is killed.
        """
        grace_ns = int(min(self._first.patience_s, _GRACE_S) * NS_PER_S)
        while not stop():
            left, deadline_ns = self.left(), monotonic_ns() + grace_ns
            signatures = self._sign(left)
            while left == self.left() and not stop():
                missing = [rank for rank in left if not signatures[rank].exists()]
                if not missing:
                    self._settle(left)
                    return True
                if monotonic_ns() > deadline_ns:
                    self._kill(missing)
                self._epoll.poll(_LOOK_S)
        return False

    def met(self) -> None:
        """All have found each other again: nobody looks any more for what was left behind on the way."""
        while self._abandoned:
            Path(self._abandoned.pop()).unlink(missing_ok=True)

    def close(self) -> None:
        for process in self._processes.values():
            os.close(process)
        self._processes.clear()
        self._epoll.close()

    def _watch(self, rank: int, pid: int) -> None:
        try:
            process = self._processes[rank] = os.pidfd_open(pid)
        except OSError as error:
            raise PeerError(f"Rank {rank} has ended.", hint="Start the server again.") from error
        self._epoll.register(process, select.EPOLLIN)

    def _name(self, left: Ranks) -> str:
        """Of a meeting of those ranks, who may have met before."""
        return f"{sum(1 << rank for rank in left):x}.{self._times[left]}"

    def _sign(self, left: Ranks) -> dict[int, Path]:
        """By rank, the file that says that it sees just `left`."""
        name = self._name(left)
        if self._signed not in ("", name):
            self._withdraw()
        self._signed = name
        files = {rank: self._signature(name, rank) for rank in left}
        files[self._first.rank].touch(0o600)
        self._agreed = left
        return files

    def _signature(self, name: str, rank: int) -> Path:
        return Path(self._first.plans).with_name(f"{Path(self._first.meeting).name}-{name}-{rank}")

    def _withdraw(self) -> None:
        """Others may have read the signature, and wait for this rank where it does not come: let them hear so."""
        self._signature(self._signed, self._first.rank).unlink()
        seat = self._seat(self._agreed, self._choose(self._agreed))
        if seat is not None and seat.size > 1:
            registry.find("distributed", seat.backend).abandon(seat)
            self._abandoned.append(seat.meeting)

    def _settle(self, left: Ranks) -> None:
        self.members = self._choose(left)
        self.seat = self._seat(left, self.members)
        self._times[left] += 1
        self._signed = ""

    def _seat(self, left: Ranks, members: Ranks) -> Seat | None:
        if self._first.rank not in members:
            return None
        name, first = self._name(left), self._first
        return msgspec.structs.replace(
            first,
            rank=members.index(first.rank),
            size=len(members),
            replicas=len(members) // first.replica_size if first.replicas > 1 else 1,
            local_size=first.local_size - first.size + len(members),
            meeting=f"{first.meeting}-{name}",
            plans=f"{first.plans}-{name}",
            bells=f"{first.bells}-{name}",
        )

    def _kill(self, ranks: Sequence[int]) -> None:
        """They hold up everybody."""
        for rank in ranks:
            if rank in self._processes and rank not in self._killed:
                self._killed.append(rank)
                _log.error("Rank %d does not answer and is killed.", rank)
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._processes[rank], signal.SIGKILL)
