"""Does --enable-two-batch-overlap pay? The time of a step of a mixture of experts on two ranks, with it and without.

    python benchmark/moe/overlap.py [--rounds 15] [--times 6] [--ways host,hosts] [--out FILE]

Two processes compute the small mixture E (8 layers, 32 experts, 4 of them a token) with --moe-a2a-backend mooncake:

    host    two ranks of one host: tokens travel through shared memory
    hosts   two network namespaces joined by a veth pair: they travel by the transfer engine, on TCP (needs root)

Each rank has the model twice, with halves of a batch that overlap and without, and computes the same steps with both
in turn. A time is that of the slower rank, from a barrier on, and of a round the shortest of a few: what strangers do
on the machine makes it longer only. The table shows medians of the rounds, of the ratios within a round, and the ratio
of the shortest of all. Fewer than 64 tokens of a rank are not cut in halves: a decode step of 32 rows must be the same
with both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from moonlang.base import registry
from moonlang.base.clock import monotonic_ns
from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import Shard
from moonlang.core.plan import Row, SlotStart, StepPlan, StepResult
from moonlang.core.sampling import SamplingParams
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.experts import open_exchange

HERE = Path(__file__).parent
RANKS, PAGE, PORT = 2, 16, 5000
CONTEXT, DECODES = 64, 16  # tokens before the decode steps, and how many of these there are before the next context


@dataclass(frozen=True)
class Case:
    """rows: requests in a step; tokens: of each."""

    rows: int
    tokens: int


CASES = {"prefill": Case(2, 256), "decode 256": Case(256, 1), "decode 32": Case(32, 1)}


class Steps:
    """The steps of one case over one copy of the model. All ranks make the same ones."""

    def __init__(self, runner: ModelRunner, case: Case) -> None:
        self._runner, self._case = runner, case
        self._numbers = count()
        self._at = CONTEXT + DECODES  # of the decode rows: as if the last one had been computed

    def prepare(self) -> None:
        """What must be there before the next step: a context for the decode rows."""
        if self._case.tokens == 1 and self._at == CONTEXT + DECODES:
            self._run(CONTEXT, fresh=True)
            self._at = CONTEXT

    def step(self) -> StepResult:
        if self._case.tokens > 1:
            return self._run(self._case.tokens, fresh=True)
        self._at += 1
        return self._run(1, fresh=False)

    def _run(self, length: int, *, fresh: bool) -> StepResult:
        start = 0 if fresh else self._at - 1
        each = -(-max(length, CONTEXT + DECODES) // PAGE)
        starts, rows = [], []
        for slot in range(self._case.rows):
            tokens = tuple(10 + (7 * i + 13 * slot) % 1000 for i in range(length)) if fresh else ()
            if fresh:
                starts.append(SlotStart(slot, 0, length, tokens, SamplingParams(temperature=0.0)))
            pages = tuple(range(1 + slot * each, 1 + (slot + 1) * each)) if fresh else ()
            rows.append(Row(slot, 0, start, length, tokens, True, 0, pages))
        return self._runner.run(StepPlan(next(self._numbers), 0, tuple(starts), tuple(rows)))


def runner(model: Path, seat: Seat, group: Group, *, overlap: bool) -> ModelRunner:
    args = ServerArgs.create(
        model_path=str(model),
        device="cpu",
        page_size=PAGE,
        max_total_tokens=(1 + max(case.rows for case in CASES.values())) * (CONTEXT + DECODES + PAGE),
        max_running_requests=max(case.rows for case in CASES.values()),
        attention_backend="cpu",
        tp_size=RANKS,
        moe_a2a_backend="mooncake",
        enable_two_batch_overlap=overlap,
    )
    config = replace(load_model_config(str(model), args), shard=Shard(seat.rank, RANKS))
    return ModelRunner(config, args, None, group, open_exchange(args, config, seat, group))


def slowest_ms(group: Group, steps: Steps, times: int) -> tuple[float, list[StepResult]]:
    """The shortest of so many steps, each as long as the slower rank took; and their results."""
    spent, results = torch.zeros(times, dtype=torch.int64), []
    for i in range(times):
        steps.prepare()
        group.barrier()
        begin_ns = monotonic_ns()
        results.append(steps.step())
        spent[i] = monotonic_ns() - begin_ns
    return float(group.all_gather(spent).amax(0).min()) / 1e6, results


def work(args: argparse.Namespace) -> None:
    """One rank: prints, if it is the first, the times of each round."""
    network = args.way == "hosts"
    meeting = f"tcp://{args.host}:{PORT}" if network else str(args.folder / "meeting")
    backend = "gloo" if network else "shared_memory"
    local = 1 if network else RANKS
    seat = Seat(rank=args.rank, size=RANKS, meeting=meeting, plans="", backend=backend, local_size=local)
    group = registry.find("distributed", backend).BACKEND(seat)
    runners = {name: runner(args.model, seat, group, overlap=name == "overlap") for name in ("plain", "overlap")}
    for case, shape in CASES.items():
        steps = {name: Steps(one, shape) for name, one in runners.items()}
        for number in range(args.rounds + 1):
            order = list(steps) if number % 2 else list(reversed(steps))
            found = {name: slowest_ms(group, steps[name], args.times) for name in order}
            plain, overlap = (
                [[(row.slot, row.tokens) for row in result.rows] for result in found[name][1]] for name in steps
            )
            assert plain == overlap, "the two have not computed the same"
            if args.rank == 0 and number:
                print(json.dumps({"case": case, **{name: found[name][0] for name in steps}}), flush=True)
    group.barrier()


def measure(way: str, model: Path, options: list[str]) -> dict[str, list[dict[str, float]]]:
    """The rounds of every case."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MC_LOG_LEVEL": "ERROR"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [__file__, *options, "--folder", str(folder), "--model", str(model), "--way", way]
        if way == "hosts":
            sys.path.insert(0, str(HERE.parents[1] / "test" / "support"))
            import two_hosts  # the tests have it already

            hosts = stack.enter_context(two_hosts.two_hosts())
            command += ["--host", two_hosts.HOSTS[0]]
            ranks = [
                hosts.python(rank, [*command, "--rank", str(rank)], stdout=subprocess.PIPE, env=environment)
                for rank in range(RANKS)
            ]
        else:
            ranks = [
                subprocess.Popen(
                    [sys.executable, *command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=environment
                )
                for rank in range(RANKS)
            ]
        output = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"{way}: {[rank.returncode for rank in ranks]}")
    rows = [json.loads(line) for line in output[0].splitlines() if line.startswith('{"case"')]
    return {
        case: [{name: row[name] for name in ("plain", "overlap")} for row in rows if row["case"] == case]
        for case in CASES
    }


def summary(way: str, rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and of plain / overlap in the same round: over 1 it pays. Printed."""
    found: dict[str, dict[str, float]] = {}
    for case, rows in rounds.items():
        one = {name: statistics.median(row[name] for row in rows) for name in ("plain", "overlap")}
        ratios = sorted(row["plain"] / row["overlap"] for row in rows)
        best = min(row["plain"] for row in rows) / min(row["overlap"] for row in rows)
        one |= {"plain/overlap": statistics.median(ratios), "least": ratios[0], "most": ratios[-1], "best": best}
        found[case] = one
        print(
            f"{way:6} {case:10} plain {one['plain']:8.2f} ms  overlap {one['overlap']:8.2f} ms  "
            f"plain/overlap {one['plain/overlap']:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), shortest {best:.3f}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--times", type=int, default=6)
    parser.add_argument("--ways", default="host,hosts")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "moe_overlap.json")
    for name, kind in (("--folder", Path), ("--model", Path), ("--way", str), ("--host", str), ("--rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        work(args)
        return
    sys.path.insert(0, str(HERE.parent))
    import engines  # the folder of the benchmarks is no package
    import random_checkpoints

    args.models.mkdir(parents=True, exist_ok=True)
    model = random_checkpoints.make("E", args.models)
    options = [f"--rounds={args.rounds}", f"--times={args.times}"]
    rounds, medians = {}, {}
    for way in args.ways.split(","):
        rounds[way] = measure(way, model, options)
        medians[way] = summary(way, rounds[way])
    cases = {name: {"rows": case.rows, "tokens": case.tokens} for name, case in CASES.items()}
    result = {"machine": engines.machine(), "cases": cases, "medians_ms": medians, "rounds_ms": rounds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
