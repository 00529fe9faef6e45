"""Where the ranks of this node sit: who they are, and where they meet."""

from __future__ import annotations

from pathlib import Path

from moonlang.config.resolve import split_address
from moonlang.config.server_args import ServerArgs
from moonlang.core.seat import Seat
from moonlang.roles import topology

_PATIENCE_S = 300.0
_SHARED_MEMORY = Path("/dev/shm")


def seats(directory: Path, args: ServerArgs) -> dict[int | None, Seat]:
    """Of this node's ranks, by world rank; none when one process computes the whole model.

    Ranks of one host meet in shared memory, ranks of several at --dist-init-addr: the one port hands out the plans, the
    next one is where torch.distributed begins, the one behind it takes the results of a pipeline. Replicas have nothing
    to do with each other, unless they share experts: then all of them meet, and each has plans of its own.
    """
    together, each = topology.replicas_together(args), topology.replica_size(args)
    size = each * together
    if size == 1:
        return {}
    ranks = topology.node_ranks(args)
    backend = "nccl" if args.device == "cuda" else "shared_memory" if args.attention_backend == "cpu" else "gloo"
    if args.nnodes > 1 and args.device != "cuda":
        backend = "gloo"
    found: dict[int | None, Seat] = {}
    for world_rank in ranks:
        meeters, rank = divmod(world_rank, size)
        meeting, plans, results = _places(directory, args, meeters, world_rank // each)
        found[world_rank] = Seat(
            rank=rank,
            size=size,
            meeting=meeting,
            plans=plans,
            backend=backend,
            stages=args.pp_size,
            replicas=together,
            results=results,
            bells=str(directory / "bells"),
            patience_s=args.dist_timeout or _PATIENCE_S,
            local_size=len(ranks),
        )
    return found


def _places(directory: Path, args: ServerArgs, meeters: int, replica: int) -> tuple[str, str, str]:
    """Where the ranks that are number `meeters` of those who meet do so, where those of `replica` get their plans, and
    where the results of a pipeline go."""
    if args.nnodes > 1:  # then there is one replica
        host, port = split_address(args.dist_init_addr or "")
        meeting, plans, results = (f"tcp://{host}:{port + i}" for i in (1, 0, 2))
        return meeting, plans, results
    meeting, plans, results = (
        f"{name}-{number}" if number else name
        for name, number in ((f"{directory.name}-ranks", meeters), ("plans", replica), ("results", replica))
    )
    return str(_SHARED_MEMORY / meeting), str(directory / plans), str(directory / results)
