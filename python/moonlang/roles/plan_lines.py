"""The line of plans of a replica's ranks: a ring within one host when messages are Mooncake's, else sockets.

Results of a pipeline come back over a socket: they are few, and one rank waits for them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from moonlang.config.server_args import ServerArgs
from moonlang.core.seat import Seat
from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.messaging.plan_line import JOIN_S, PlanReceiver, PlanSender


class PlanOut(Protocol):
    """See `messaging.plan_line.PlanSender`."""

    def send(self, frame: bytes) -> None: ...

    def close(self) -> None: ...


class PlanIn(Protocol):
    """See `messaging.plan_line.PlanReceiver`."""

    @property
    def ended(self) -> bool: ...

    def fileno(self) -> int: ...

    def recv(self) -> Sequence[bytes]: ...

    def wait(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


def plan_sender(args: ServerArgs, seat: Seat, join_s: float = JOIN_S) -> PlanOut:
    """Rank 0's end; waits for the other ranks. PeerError when they do not come within `join_s`."""
    if _is_ring(args):
        from moonlang.mooncake.plan_ring import PlanRingSender

        return PlanRingSender(seat.plans, seat.replica_size - 1, join_s, token=_token())
    return PlanSender(seat.plans, seat.replica_size - 1, join_s, token=_token())


def plan_receiver(args: ServerArgs, seat: Seat, join_s: float = JOIN_S) -> PlanIn:
    """The end of any other rank. PeerError when rank 0 is not there within `join_s`."""
    if _is_ring(args):
        from moonlang.mooncake.plan_ring import PlanRingReceiver

        return PlanRingReceiver(seat.plans, join_s, token=_token())
    return PlanReceiver(seat.plans, join_s, token=_token())


def result_sender(seat: Seat) -> PlanSender:
    """The end of the last stage of a pipeline. PeerError when rank 0 is not there."""
    return PlanSender(seat.results, 1, token=_token(), listens=False)


def result_receiver(seat: Seat) -> PlanReceiver:
    """Rank 0's end of the same line; waits for the last stage. PeerError when it does not come."""
    return PlanReceiver(seat.results, token=_token(), listens=True)


def _is_ring(args: ServerArgs) -> bool:
    return args.messaging_backend == "mooncake" and args.nnodes == 1


def _token() -> str:
    """The user's: nodes are started one by one, and one that was drawn would not be the same on all."""
    return os.environ.get(TOKEN_VARIABLE, "")
