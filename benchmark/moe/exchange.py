"""How long do tokens take to the ranks that hold their experts and back, against all_to_all_single of torch's gloo?

    python benchmark/moe/exchange.py [--rounds 15] [--times 20] [--tokens 256] [--columns 2048] [--out FILE]

Every rank is a process with 256 tokens of 2,048 bfloat16 numbers, each of which goes to 4 of 64 experts. The ways take
turns:

    gloo       two calls of all_to_all_single with the rows ready: what the others are measured by
    mooncake   dispatch and combine through shared memory: choosing rows, packing, sorting by expert, and adding up
    te         the same over Mooncake's transfer engine, as between hosts, on TCP

All carry the same rows: a token once to each rank that has an expert for it, and a row for each of its experts back. A
time is that of the slowest rank, from a barrier on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import sgl_kernel
import torch
from torch import Tensor

from moonlang.base import registry
from moonlang.base.clock import monotonic_ns
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.distributed.torch_group import TorchGroup
from moonlang.kernels.expert_weights import native
from moonlang.moe.exchange.port import ExchangeSpec, ExpertExchange, weighted_sum
from moonlang.moe.placement import Placement, even
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.exchange import open_exchange
from moonlang.mooncake.exchange_remote import open_between_hosts

HERE = Path(__file__).parent
EXPERTS, PER_TOKEN = 64, 4
SIZES = (2, 4)
WAYS = ("gloo", "mooncake", "te")
AT_LEAST, AT_MOST = 3.0, 2.0  # gloo / mooncake, te / gloo


class Batch:
    """The tokens of one rank. wanted: [R, T], who has an expert for whom."""

    def __init__(self, rank: int, size: int, tokens: int, columns: int) -> None:
        made = torch.Generator().manual_seed(rank)
        self.x = torch.randn(tokens, columns, generator=made).bfloat16()
        self.experts = torch.rand(tokens, EXPERTS, generator=made).topk(PER_TOKEN).indices
        self.weights = torch.rand(tokens, PER_TOKEN, generator=made)
        owners = self.experts * size // EXPERTS
        self.wanted = (owners == torch.arange(size).view(-1, 1, 1)).any(-1)
        self.pairs = owners.flatten().bincount(minlength=size).tolist()


class Gloo:
    """The same rows by two calls of all_to_all_single. What each rank sends is told in advance, and not counted."""

    def __init__(self, batch: Batch, group: TorchGroup) -> None:
        self._batch, self._group = batch, group
        self._there = batch.wanted.sum(1).tolist()
        self._there_from = self._told(self._there)
        self._back = self._told(batch.pairs)
        self._rows = batch.x[batch.wanted.nonzero()[:, 1]]
        self._outputs = batch.x.new_zeros(sum(self._back), batch.x.shape[1])

    def run(self) -> None:
        self._carry(self._rows, self._there, self._there_from)
        self._carry(self._outputs, self._back, self._batch.pairs)

    def _carry(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        found = rows.new_empty(sum(received), rows.shape[1])
        self._group.all_to_all_single(found, rows, received, sent)
        return found

    def _told(self, counts: list[int]) -> list[int]:
        return [int(part) for part in self._group.all_to_all(torch.tensor(counts).split(1))]


def by_exchange(exchange: ExpertExchange, batch: Batch, placement: Placement) -> Callable[[], object]:
    """Experts whose outputs are ready: the rows that arrive are read where they lie, as the kernels do."""
    got = exchange.combine(exchange.dispatch(batch.x, batch.experts, placement).rows, batch.weights)
    assert torch.equal(got, weighted_sum(batch.x.unsqueeze(1).expand(-1, PER_TOKEN, -1), batch.weights))
    (lane,) = exchange.native
    chosen, y, placed = batch.experts.int(), torch.empty_like(batch.x), native(placement)
    lane.dispatch(batch.x, chosen, placed)
    outputs = batch.x.new_zeros(lane.arrived()[-1], batch.x.shape[1])
    lane.rows(outputs)
    lane.give_back(outputs)
    lane.combine(batch.weights, y)

    def run() -> None:
        lane.dispatch(batch.x, chosen, placed)
        lane.arrived()
        lane.give_back(outputs)
        lane.combine(batch.weights, y)

    return run


def slowest_us(group: Group, run: Callable[[], object], times: int) -> list[float]:
    """Of each time, how long the slowest rank took, in microseconds."""
    spent = torch.zeros(times, dtype=torch.int64)
    for i in range(times):
        group.barrier()
        begin_ns = monotonic_ns()
        run()
        spent[i] = monotonic_ns() - begin_ns
    return (group.all_gather(spent).amax(0) / 1000).tolist()


def work(folder: Path, rank: int, size: int, args: argparse.Namespace) -> None:
    """One rank: prints, if it is the first, the median of each way in each round."""
    torch.set_num_threads(1)
    sgl_kernel.set_threads(1)
    seat = Seat(
        rank=rank, size=size, meeting=str(folder / "meeting"), plans="", backend="shared_memory", local_size=size
    )
    group = registry.find("distributed", seat.backend).BACKEND(seat)
    spec = ExchangeSpec(experts=EXPERTS, per_token=PER_TOKEN, columns=args.columns, dtype=torch.bfloat16)
    placement = even(EXPERTS, size)
    batch = Batch(rank, size, args.tokens, args.columns)
    gloo = Gloo(batch, TorchGroup.over("gloo")(msgspec.structs.replace(seat, meeting=str(folder / "gloo"))))
    engine = Engine(MooncakeConfig(local_hostname="127.0.0.1"))
    ways = {
        "gloo": gloo.run,
        "mooncake": by_exchange(open_exchange(spec, seat, group), batch, placement),
        "te": by_exchange(open_between_hosts(spec, seat, group, engine), batch, placement),
    }
    for number in range(args.rounds + 1):
        row = {name: statistics.median(slowest_us(group, run, args.times)) for name, run in ways.items()}
        if rank == 0 and number:
            print(json.dumps(row), flush=True)
    group.barrier()
    engine.close()


def measure(size: int, options: list[str]) -> list[dict[str, float]]:
    """The rounds of `size` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *options, "--folder", folder, "--size", str(size), "--rank"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MC_LOG_LEVEL": "ERROR"}
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(size)
        ]
        output = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"{size} ranks: {[rank.returncode for rank in ranks]}")
    return [json.loads(line) for line in output[0].splitlines() if line.startswith("{")]


def summary(size: int, rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds, ratios of the same round; printed."""
    found = {name: statistics.median(row[name] for row in rounds) for name in WAYS}
    found["gloo/mooncake"] = statistics.median(row["gloo"] / row["mooncake"] for row in rounds)
    found["te/gloo"] = statistics.median(row["te"] / row["gloo"] for row in rounds)
    print(f"{size} ranks: " + ", ".join(f"{name} {found[name]:.0f} us" for name in WAYS))
    faster, slower = found["gloo/mooncake"], found["te/gloo"]
    print(f"    mooncake {faster:.2f}x faster than gloo: {'reached' if faster >= AT_LEAST else 'MISSED'} {AT_LEAST:g}")
    print(f"    te {slower:.2f}x the time of gloo: {'reached' if slower <= AT_MOST else 'MISSED'} {AT_MOST:g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "moe_exchange.json")
    for name, kind in (("--folder", Path), ("--size", int), ("--rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        work(args.folder, args.rank, args.size, args)
        return
    sys.path.insert(0, str(HERE.parent))
    import engines  # the folder of the benchmarks is no package

    options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "times", "tokens", "columns")]
    rounds = {size: measure(size, options) for size in SIZES}
    medians = {size: summary(size, found) for size, found in rounds.items()}
    shape = {"tokens": args.tokens, "columns": args.columns, "experts": EXPERTS, "per_token": PER_TOKEN}
    result = {"machine": engines.machine(), "shape": shape, "medians_us": medians, "rounds_us": rounds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
