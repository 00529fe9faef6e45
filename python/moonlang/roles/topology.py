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
_FRONT = f"{API}-"  # followed by its number; the first one has the plain name, as of the next two
_DETOKENIZER = f"{DETOKENIZER}-"
_WORKER = "worker-"  # followed by its rank
_REPLICA = f"{SCHEDULER}-"  # followed by the replica
_OWNER = "~"  # between the id of a request and the number of its front


def front(number: int) -> str:
    """The role that answers HTTP requests as one of several."""
    return f"{_FRONT}{number}" if number else API


def fronts(args: ServerArgs) -> tuple[str, ...]:
    """All of them, in order; the first is the process that the user started."""
    return tuple(map(front, range(args.tokenizer_worker_num)))


def owned(rid: str, number: int) -> str:
    """The id under which the engine knows a request of front `number` of several. What a client chose is its beginning:
    fronts do not know of each other's requests, and two of them may be given the same id."""
    return f"{rid}{_OWNER}{number}"


def owner(rid: str) -> int:
    """The front that has a request, by the id that the engine knows."""
    return int(rid[rid.rindex(_OWNER) + 1 :])


def detokenizers(args: ServerArgs) -> tuple[str, ...]:
    """All of them, in order."""
    more = range(1, args.detokenizer_worker_num)
    return (DETOKENIZER, *(f"{_DETOKENIZER}{number}" for number in more))


def scheduler(replica: int) -> str:
    """The role that plans for a data-parallel replica."""
    return f"{_REPLICA}{replica}" if replica else SCHEDULER


def schedulers(args: ServerArgs) -> tuple[str, ...]:
    """Of all replicas, in their order."""
    return tuple(map(scheduler, range(args.dp_size)))


def worker(rank: int) -> str:
    """The role that computes as world rank `rank`, unless that is the first of its replica: this is the scheduler."""
    return f"{_WORKER}{rank}"


def is_worker(role: str) -> bool:
    """Whether a role computes for the plans of another."""
    return role.startswith(_WORKER)


def replica_size(args: ServerArgs) -> int:
    """Ranks of one replica; those of --tp-size are dealt out to replicas that share experts."""
    return args.tp_size * args.pp_size // replicas_together(args)


def replicas_together(args: ServerArgs) -> int:
    """How many replicas compute one model together: they share its experts."""
    return args.dp_size if args.enable_dp_attention else 1


def rank(role: str, args: ServerArgs) -> int | None:
    """The world rank as which a role computes; None when it does not. World ranks go from replica to replica."""
    if role == SCHEDULER:
        return 0
    if role.startswith(_REPLICA):
        return int(role.removeprefix(_REPLICA)) * replica_size(args)
    return int(role.removeprefix(_WORKER)) if role.startswith(_WORKER) else None


def replica(role: str, args: ServerArgs) -> int:
    """The replica for which a role plans or computes; 0 for the others."""
    return (rank(role, args) or 0) // replica_size(args)


def node_ranks(args: ServerArgs) -> range:
    """The world ranks that run on this node."""
    each = args.dp_size * replica_size(args) // args.nnodes
    return range(args.node_rank * each, (args.node_rank + 1) * each)


def children(args: ServerArgs) -> tuple[str, ...]:
    """The roles of an engine on this node; all but workers are on the first."""
    workers = tuple(worker(rank) for rank in node_ranks(args) if rank % replica_size(args))
    if args.node_rank:
        return workers
    return (*workers, *schedulers(args)[1:], *detokenizers(args)[1:], *fronts(args)[1:], *CHILDREN)


def program(role: str) -> str:
    """The module that a child of this role runs."""
    return "moonlang.entrypoints.http_worker" if role.startswith(_FRONT) else "moonlang.roles.process"


def addresses(directory: PurePath, roles: Sequence[str] = CHILDREN) -> dict[str, str]:
    """The mailbox of every role, and of the API process, as a socket in the run directory."""
    return {role: f"ipc://{directory / role}.sock" for role in (API, *roles)}


def title(role: str) -> str:
    """The process title of a role."""
    return f"moonlang::{role}"
