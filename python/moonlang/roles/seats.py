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
    """Of this node's ranks, by rank; none when one process computes the whole model.

    Ranks of one host meet in shared memory, ranks of several at --dist-init-addr: the one port hands out the plans, the
    next one is where torch.distributed begins.
    """
    size = args.tp_size
    if size == 1:
        return {}
    ranks = topology.node_ranks(args)
    meeting, plans = str(_SHARED_MEMORY / f"{directory.name}-ranks"), str(directory / "plans")
    backend = "nccl" if args.device == "cuda" else "shared_memory" if args.attention_backend == "cpu" else "gloo"
    if args.nnodes > 1:
        host, port = split_address(args.dist_init_addr or "")
        meeting, plans = f"tcp://{host}:{port + 1}", f"tcp://{host}:{port}"
        backend = "nccl" if args.device == "cuda" else "gloo"
    return {
        rank: Seat(
            rank=rank,
            size=size,
            meeting=meeting,
            plans=plans,
            backend=backend,
            patience_s=args.dist_timeout or _PATIENCE_S,
            local_size=len(ranks),
        )
        for rank in ranks
    }
