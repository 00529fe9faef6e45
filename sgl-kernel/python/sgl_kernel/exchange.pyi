from collections.abc import Callable, Sequence
from typing import Any

from numpy import uint8
from numpy.typing import NDArray

class Mailboxes:
    """See cpp/base/mailboxes.h. In each round every rank sends a message to every other, then receives theirs."""

    rank: int
    size: int
    box_bytes: int
    def outbox(self, to: int) -> NDArray[uint8]:
        """Where the message of the next round to rank `to` is written."""

    def send(self, counts: Sequence[int]) -> None:
        """Begin the next round: so many bytes are for each rank. Gives up the messages of the last one."""

    def receive(self, sender: int) -> NDArray[uint8]:
        """The message of another rank in this round, until the next `send`. RankLostError."""

class SharedMailboxes(Mailboxes):
    """Within a host, over memory that all have mapped, which `owner` keeps. path: of a file for the ranks to wait on
    each other."""

    def __init__(
        self,
        path: str,
        address: int,
        memory_bytes: int,
        rank: int,
        size: int,
        *,
        box_bytes: int,
        patience_ms: int,
        spin_us: int,
        owner: Any,
    ) -> None: ...
    @staticmethod
    def memory_bytes(size: int, box_bytes: int) -> int:
        """What so many ranks need, zeros at first."""

class CarriedMailboxes(Mailboxes):
    """Anywhere. post: sends the messages of a round, by rank (None: its own). take: waits for that of a rank."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        box_bytes: int,
        post: Callable[[list[NDArray[uint8] | None]], None],
        take: Callable[[int], NDArray[uint8]],
    ) -> None: ...
    def memory(self) -> NDArray[uint8]:
        """That of all messages which it sends."""

class Placement:
    """Where all experts of a layer are."""

    @staticmethod
    def of(copies: Sequence[Sequence[tuple[int, int]]], held: Sequence[int]) -> Placement:
        """copies: by expert, (rank, slot) of each of its copies. held: by rank, the number of slots. ValueError."""

class Exchange:
    """See cpp/ops/exchange.h. Calls come in this order, and on all ranks.

    payload: in what form rows travel to their experts, "plain" or "int8".
    """

    rank: int
    size: int
    def __init__(self, boxes: Mailboxes, payload: str = "plain") -> None: ...
    def most_tokens(self, row_bytes: int, per_token: int) -> int:
        """The most that a rank may dispatch at a time."""

    def dispatch(self, x: Any, chosen: Any, placement: Placement) -> None:
        """Send x [T, M] to the experts chosen [T, X] int32, whose copies take turns. placement: on all ranks equal."""

    def arrived(self) -> list[int]:
        """Wait for the rows of all: those of slot s are [begin[s], begin[s + 1])."""

    def rows(self, out: Any) -> None:
        """Copy the rows that arrived: out [begin[-1], M]."""

    def give_back(self, z: Any) -> None:
        """Send back what became of them: z like `out` of `rows`."""

    def combine(self, weights: Any, y: Any) -> None:
        """Wait for what became of this rank's tokens: y [T, M] = their sum by weights [T, X] float32, in that order."""
