"""The ports: what brain and roles need from adapters and muscle. At most six methods each, all mandatory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from moonlang.core.kv import KvRegion
from moonlang.core.messages import Envelope, Message
from moonlang.core.pairing import KvCard, PairEvent, PairMessage, PeerSpec, TransferOp
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.sampling import GrammarSpec
from moonlang.core.storage import HostOp, StoreOp
from moonlang.core.ticket import Completion, Ticket

Op = TypeVar("Op", contravariant=True)


class Channel(Protocol[Op]):
    """The one shape of everything asynchronous."""

    def submit(self, op: Op) -> Ticket: ...

    def poll(self) -> Sequence[Completion]:
        """Completions since the last call, sorted by ticket id; never blocks."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """A wish: the Completion still arrives."""
        ...

    def close(self) -> None: ...


class GrammarEngine(Channel[GrammarSpec], Protocol):
    """Compiles grammars off the critical path. After an OK completion `matcher` gives a fresh automaton."""

    def matcher(self, spec: GrammarSpec) -> GrammarMatcher: ...

    def fileno(self) -> int:
        """Readable when `poll` has something."""
        ...


class GrammarMatcher(Protocol):
    """Where one sequence stands in its grammar."""

    def accept(self, token: int) -> bool:
        """Advance by one token; False when the grammar does not allow it."""
        ...

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        """Write the allowed tokens into row `row` of an int32 array [rows, ceil(V / 32)]; bit set means allowed."""
        ...

    @property
    def ended(self) -> bool:
        """True when nothing but the end of the sequence may follow."""
        ...


class Executor(Protocol):
    """Runs plans strictly in order. Results come in the same order."""

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; never blocks on the model when `depth` plans or fewer are in flight."""
        ...

    def poll(self) -> Sequence[StepResult]:
        """Finished plans since the last call; never blocks. Raises what the model raised, which is fatal."""
        ...

    def progress(self) -> tuple[int, int]:
        """(plan id, layers whose keys and values are in the pool) of the newest plan that reports (`report_layers`)."""
        ...

    def fileno(self) -> int:
        """Readable when `poll` has something, or `progress` has changed."""
        ...

    def close(self) -> None: ...


class KvTransfer(Channel[TransferOp], Protocol):
    """Moves pages between the pools of instances. Ops to one peer are carried out in order; bytes in flight per peer
    are bounded, the rest waits inside. A cancelled push still completes, and only when nothing of it is under way."""

    def register(self, regions: Sequence[KvRegion], instance: str) -> KvCard:
        """Make the pools of this process known to the backend; once, before anything is submitted."""
        ...

    def fileno(self) -> int:
        """Readable when `poll` has something."""
        ...


class HostPool(Channel[HostOp], Protocol):
    """Pages in host memory that this process does not share."""

    def register(self, regions: Sequence[KvRegion]) -> int:
        """Make the device pools of all ranks known, once, before anything is submitted; returns the number of host
        slots."""
        ...

    def fileno(self) -> int:
        """Readable when `poll` has something."""
        ...


class KvStore(Channel[StoreOp], Protocol):
    """Pages in a store shared by all instances of a model. Dead, slow, full or lying: then its ops fail, and quickly
    once that is known."""

    def register(self, regions: Sequence[KvRegion]) -> None:
        """Make the device pools of all ranks known, once, before anything is submitted."""
        ...

    def fileno(self) -> int:
        """Readable when `poll` has something."""
        ...


class PeerLink(Protocol):
    """Control messages between instances: finds them, connects, notices when they are gone (within a second)."""

    def open(self, spec: PeerSpec, deadline_ns: int) -> None:
        """Find and connect the instance that holds a room; answered by one Linked or Unreachable."""
        ...

    def send(self, instance: str, body: PairMessage) -> None:
        """Queue a message; dropped when the instance is not connected (its Lost says so)."""
        ...

    def recv(self) -> list[PairEvent]:
        """What has happened since the last call; never blocks."""
        ...

    def fileno(self) -> int:
        """Readable when `recv` has something."""
        ...

    def close(self) -> None: ...


class Endpoint(Protocol):
    """A process's mailbox. Bounded: `send` raises PeerError when the peer's inbox stays full or the peer is gone."""

    name: str

    def send(self, to: str, body: Message) -> None: ...

    def recv(self, most: int = 256) -> list[Envelope]:
        """Up to `most` messages that have arrived; never blocks."""
        ...

    def wait(self, timeout_ns: int, *, also: Sequence[int] = ()) -> None:
        """Block until a message is there, a file descriptor in `also` is readable, or the time is up."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when a message may have come: after it fires, `recv` until empty."""
        ...

    def close(self) -> None: ...
