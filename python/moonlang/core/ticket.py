"""Everything slow is a ticket: submitted once, completed exactly once, also after a cancel."""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Outcome(IntEnum):
    OK = 0
    FAILED = 1
    CANCELLED = 2


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Names work in progress. Ids grow within one adapter; `kind` says which adapter."""

    id: int
    kind: str


class Completion(msgspec.Struct, frozen=True, array_like=True):
    """The end of a ticket. count and bytes say how much was done; error is a sentence for the log and the client;
    value: a result that is one number (a checksum)."""

    ticket: Ticket
    outcome: Outcome
    count: int = 0
    bytes: int = 0
    error: str = ""
    value: int = 0
