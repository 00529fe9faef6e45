"""Which roles an engine consists of and where their mailboxes are. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from moonlang.config.server_args import ServerArgs

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


def node_ranks(args: ServerArgs) -> range:
    """The ranks that run on this node."""
    each = args.tp_size // args.nnodes
    return range(args.node_rank * each, (args.node_rank + 1) * each)


def children(args: ServerArgs) -> tuple[str, ...]:
    """The roles of an engine on this node; all but workers are on the first."""
    workers = tuple(worker(rank) for rank in node_ranks(args) if rank > 0)
    return (*workers, *CHILDREN) if args.node_rank == 0 else workers


def addresses(directory: PurePath, roles: Sequence[str] = CHILDREN) -> dict[str, str]:
    """The mailbox of every role, and of the API process, as a socket in the run directory."""
    return {role: f"ipc://{directory / role}.sock" for role in (API, *roles)}


def title(role: str) -> str:
    """The process title of a role."""
    return f"moonlang::{role}"
