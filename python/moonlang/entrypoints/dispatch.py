"""Which replica of the engine serves a request: --load-balance-method. Plain arithmetic, without clock or sockets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate


@dataclass(slots=True)
class Share:
    """What a replica has to do: requests that were sent to it and have not ended, with the tokens of their prompts and
    those they have said so far."""

    requests: int = 0
    tokens: int = 0


class Board(Protocol):
    """Shared by several fronts, each of which sends requests by itself."""

    def put(self, replica: int, requests: int, tokens: int) -> None:
        """Say what this front has at a replica."""
        ...

    def total(self, replica: int) -> tuple[int, int]:
        """(requests, tokens) of all fronts, this one included."""
        ...


class Dispatch:
    """Keeps the shares of all replicas, and chooses by them.

    method: as resolved, not auto. size: number of replicas; one replica costs nothing. board: where this front and
    others write down what they have sent; turn: which replica comes first.
    """

    def __init__(self, method: str, size: int, *, board: Board | None = None, turn: int = 0) -> None:
        self.size = size
        self._board = board
        self.shares = [Share() for _ in range(size)]
        self._choose: Callable[[Generate], int] = {
            "round_robin": self._next,
            "follow_bootstrap_room": self._of_room,
            "total_requests": self._fewest_requests,
            "total_tokens": self._fewest_tokens,
        }[method]
        self._turn = turn % size
        self.living = tuple(range(size))

    def choose(self, message: Generate) -> int:
        """The replica for a request. RequestError 400 when it asks for one that does not exist, 503: that is lost."""
        wanted = message.dp_rank
        if wanted is None:
            return self._choose(message) if self.size > 1 else 0
        if not 0 <= wanted < self.size:
            raise RequestError(f"routed_dp_rank must be in [0, {self.size - 1}], got {wanted}.")
        if wanted not in self.living:
            raise RequestError(f"Replica {wanted} is lost.", status=503, hint="Leave out routed_dp_rank.")
        return wanted

    def lose(self, replica: int) -> None:
        """Nothing is sent there any more; what was there has to be sent again."""
        self.living = tuple(one for one in self.living if one != replica)
        self.shares[replica] = Share()
        self._tell(replica)

    def began(self, replica: int, tokens: int) -> None:
        """A request with a prompt of so many tokens has been sent."""
        share = self.shares[replica]
        share.requests += 1
        share.tokens += tokens
        self._tell(replica)

    def grew(self, replica: int, tokens: int) -> None:
        """A request has said something."""
        self.shares[replica].tokens += tokens
        self._tell(replica)

    def ended(self, replica: int, tokens: int) -> None:
        """A request has ended. tokens: all that it had, prompt and output."""
        share = self.shares[replica]
        share.requests -= 1
        share.tokens -= tokens
        self._tell(replica)

    def _tell(self, replica: int) -> None:
        if self._board is not None:
            self._board.put(replica, self.shares[replica].requests, self.shares[replica].tokens)

    def _total(self, replica: int) -> tuple[int, int]:
        """(requests, tokens) of a replica."""
        share = self.shares[replica]
        return (share.requests, share.tokens) if self._board is None else self._board.total(replica)

    def _next(self, message: Generate) -> int:
        turn = next((one for one in self.living if one >= self._turn), self.living[0])
        self._turn = (turn + 1) % self.size
        return turn

    def _of_room(self, message: Generate) -> int:
        """As a peer that knows nothing but the room would compute it; requests without one take turns."""
        return self._next(message) if message.peer is None else message.peer.room % self.size

    def _fewest_requests(self, message: Generate) -> int:
        return self._least(lambda replica: self._total(replica)[0], message)

    def _fewest_tokens(self, message: Generate) -> int:
        return self._least(lambda replica: self._total(replica)[1], message)

    def _least(self, load: Callable[[int], int], message: Generate) -> int:
        """The replica with the least to do; those that are equal take turns."""
        first = self._next(message)
        return min(self.living, key=lambda replica: (load(replica), (replica - first) % self.size))
