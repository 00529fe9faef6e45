"""One half of prefill/decode disaggregation, as the driver and the scheduler see it.

A request that has a peer is in the hands of the side from the moment it enters until it can go on like any other:
`prefill_side` finds decode's Want for it and sends the pages as they are computed, `decode_side` leases pages, asks for
them and verifies what comes. Both are pure: what they want done lies in their Mail until the driver fetches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from moonlang.core.lease import Lease
from moonlang.core.messages import TokenDelta
from moonlang.core.pairing import PairEvent, PairMessage, PeerSpec, TransferOp
from moonlang.core.plan import Row, RowResult
from moonlang.core.request import Finish, Request
from moonlang.core.ticket import Completion
from moonlang.scheduler.settings import PairStats

NEVER_NS = 1 << 62

End = Callable[[Request, Finish, RowResult | None], TokenDelta]
Accept = Callable[[Request, RowResult], TokenDelta | None]


class Mail:
    """What a side wants done: the driver fetches it after every step, in the order of these methods.

    opens: pairs to find, each with the time to give up. outgoing: messages to instances. transfers: operations for the
    KvTransfer under numbers of the side's own making; their completions come back under the same number. cancels:
    numbers of operations that are not wanted any more; they still complete.
    """

    def __init__(self) -> None:
        self._opens: list[tuple[PeerSpec, int]] = []
        self._outgoing: list[tuple[str, PairMessage]] = []
        self._transfers: list[tuple[int, TransferOp]] = []
        self._cancels: list[int] = []
        self._next_number = 0
        self._wake_ns = NEVER_NS

    def opens(self) -> list[tuple[PeerSpec, int]]:
        taken, self._opens = self._opens, []
        return taken

    def outgoing(self) -> list[tuple[str, PairMessage]]:
        taken, self._outgoing = self._outgoing, []
        return taken

    def transfers(self) -> list[tuple[int, TransferOp]]:
        taken, self._transfers = self._transfers, []
        return taken

    def cancels(self) -> list[int]:
        taken, self._cancels = self._cancels, []
        return taken

    # ---- for the side

    def open(self, spec: PeerSpec, deadline_ns: int) -> None:
        self._opens.append((spec, deadline_ns))

    def send(self, instance: str, body: PairMessage) -> None:
        self._outgoing.append((instance, body))

    def submit(self, op: TransferOp) -> int:
        """Queue an operation; returns its number."""
        number = self._next_number
        self._next_number += 1
        self._transfers.append((number, op))
        return number

    def cancel(self, numbers: Sequence[int]) -> None:
        self._cancels += numbers


class Alarm:
    """The nearest of many times. It may ring early, never late."""

    def __init__(self) -> None:
        self._at_ns = NEVER_NS

    @property
    def at_ns(self) -> int | None:
        return None if self._at_ns == NEVER_NS else self._at_ns

    def set(self, *times_ns: int) -> None:
        """Ring at the first of these too."""
        self._at_ns = min(self._at_ns, *times_ns)

    def rings(self, now_ns: int) -> bool:
        """True once when the time has come; all times must then be set again."""
        if now_ns < self._at_ns:
            return False
        self._at_ns = NEVER_NS
        return True


class PairSide(Protocol):
    """See the module's docstring. Deltas that a method returns are for the clients, like those of Scheduler.commit."""

    mail: Mail

    # ---- for the driver

    def heard(self, event: PairEvent, now_ns: int) -> list[TokenDelta]:
        """Something came from the PeerLink."""
        ...

    def transferred(self, number: int, completion: Completion, now_ns: int) -> list[TokenDelta]:
        """Operation `number` of the mail has ended, in whatever way."""
        ...

    def progress(self, plan_id: int, layers: int) -> None:
        """The executor has written the KV of the first `layers` layers of a plan in flight."""
        ...

    def stats(self) -> PairStats: ...

    # ---- for the scheduler

    def enter(self, request: Request, now_ns: int) -> list[TokenDelta]:
        """Take charge of a request that has a peer."""
        ...

    def leave(self, request: Request, finish: Finish, lease: Lease | None) -> None:
        """A request that has a peer ends, in whatever state; `lease`: what it held, the side's to close."""
        ...

    def expire(self, now_ns: int) -> list[TokenDelta]:
        """Give up what has waited too long; say again what has not been answered."""
        ...

    def reserve(self, now_ns: int) -> list[TokenDelta]:
        """Before every plan: lease pages for requests that are to come."""
        ...

    def lay(self, plan_id: int, rows: Sequence[Row]) -> int:
        """A plan of these rows is made; returns after every how many layers it is to report progress, 0 for never."""
        ...

    def computed(self, request: Request, outcome: RowResult) -> None:
        """The last row of a bound request has run; its end is told by `committed` or later."""
        ...

    def committed(self, plan_id: int, now_ns: int) -> list[TokenDelta]:
        """The result of a plan has been taken."""
        ...

    @property
    def wake_ns(self) -> int | None:
        """When `expire` has something to do although nothing arrives."""
        ...

    @property
    def leases(self) -> list[Lease]:
        """Leases that belong to no request of the roster."""
        ...

    @property
    def holds_memory(self) -> bool:
        """Whether pages are held that come back without a plan."""
        ...


class NoPeers:
    """The side of a server that stands alone."""

    wake_ns = None
    holds_memory = False

    def __init__(self) -> None:
        self.mail = Mail()
        self.leases: list[Lease] = []

    def heard(self, event: PairEvent, now_ns: int) -> list[TokenDelta]:
        return []

    def transferred(self, number: int, completion: Completion, now_ns: int) -> list[TokenDelta]:
        return []

    def progress(self, plan_id: int, layers: int) -> None:
        pass

    def stats(self) -> PairStats:
        return PairStats()

    def enter(self, request: Request, now_ns: int) -> list[TokenDelta]:
        return []

    def leave(self, request: Request, finish: Finish, lease: Lease | None) -> None:
        pass

    def expire(self, now_ns: int) -> list[TokenDelta]:
        return []

    def reserve(self, now_ns: int) -> list[TokenDelta]:
        return []

    def lay(self, plan_id: int, rows: Sequence[Row]) -> int:
        return 0

    def computed(self, request: Request, outcome: RowResult) -> None:
        pass

    def committed(self, plan_id: int, now_ns: int) -> list[TokenDelta]:
        return []
