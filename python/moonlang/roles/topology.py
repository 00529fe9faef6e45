"""Which roles an engine consists of and where their mailboxes are. Pure."""

from __future__ import annotations

from pathlib import PurePath

API = "api"  # the process that the user started; it owns the others
SCHEDULER = "scheduler"
DETOKENIZER = "detokenizer"

CHILDREN = (SCHEDULER, DETOKENIZER)  # in the order they are started: the slow one first
ROLES = (API, *CHILDREN)
_WORKER = "worker-"  # followed by its rank


def worker(rank: int) -> str:
    """The role that computes as rank `rank` > 0; rank 0 is the scheduler's own."""
    return f"{_WORKER}{rank}"


def rank(role: str) -> int | None:
    """The rank as which a role computes; None when it does not."""
    if role == SCHEDULER:
        return 0
    return int(role.removeprefix(_WORKER)) if role.startswith(_WORKER) else None


def children(ranks: int) -> tuple[str, ...]:
    """The roles of an engine of so many ranks."""
    return (*map(worker, range(1, ranks)), *CHILDREN)


def addresses(directory: PurePath, ranks: int = 1) -> dict[str, str]:
    """The mailbox of every role as a socket in the run directory."""
    return {role: f"ipc://{directory / role}.sock" for role in (API, *children(ranks))}


def title(role: str) -> str:
    """The process title of a role."""
    return f"moonlang::{role}"
