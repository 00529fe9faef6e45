"""MoonLang and its peers on one CPU, in turns on the same work: latencies, throughput, start-up and memory.

Every engine serves the same random checkpoint to the same client on the same cores. Within a round each engine gets its
turn, so that a noisy neighbour meets all of them; medians over the rounds are compared. A ratio above 1 means that
MoonLang is better.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import checkpoints
import engines
import psutil
from load import Load, run

HERE = Path(__file__).parent
OURS = "moonlang"

# What is compared, by case: the checkpoint, the work of a round, and the figures that count.
LATENCY, RATE = ("ttft_p50_ms", "tpot_p50_ms"), ("tokens_per_s",)
CASES: dict[str, tuple[str, Load, tuple[str, ...]]] = {
    "M-512": ("M", Load(requests=3, concurrency=1, input_len=512, output_len=24), LATENCY),
    "M-2048": ("M", Load(requests=2, concurrency=1, input_len=2048, output_len=24), LATENCY),
    "M-offline": ("M", Load(requests=32, concurrency=32, input_len=256, output_len=64, stream=False), RATE),
    "M-online": ("M", Load(requests=24, concurrency=8, input_len=256, output_len=64), (*RATE, *LATENCY)),
    "M-prefix": (
        "M",
        Load(requests=16, concurrency=16, input_len=1056, output_len=32, shared_prefix=1024, stream=False),
        RATE,
    ),
    "S-offline": ("S", Load(requests=64, concurrency=64, input_len=128, output_len=128, stream=False), RATE),
    "S-single": ("S", Load(requests=3, concurrency=1, input_len=128, output_len=128), LATENCY),
    "E-offline": ("E", Load(requests=32, concurrency=32, input_len=128, output_len=64, stream=False), RATE),
    "E-single": ("E", Load(requests=3, concurrency=1, input_len=512, output_len=64), LATENCY),
    "T64": ("T", Load(requests=128, concurrency=64, input_len=32, output_len=128), RATE),
    "T1": ("T", Load(requests=4, concurrency=1, input_len=32, output_len=128), ("tpot_p50_ms",)),
}
_LESS_IS_BETTER = ("ttft_p50_ms", "tpot_p50_ms", "start_s")


@dataclasses.dataclass
class Engine:
    """A server under test. figures: by case, one dict per round."""

    name: str
    port: int
    start_s: float
    figures: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    memory_mb: float = 0.0


def start(stack: ExitStack, name: str, command: str, model: Path, log: Path) -> Engine:
    begin = time.monotonic()
    port = stack.enter_context(engines.serving(command, model, log))
    return Engine(name, port, time.monotonic() - begin)


def memory_mb(port: int) -> float:
    """Proportional share of memory (PSS) of the processes that descend from this one and serve `port`."""
    total = 0
    for child in psutil.Process().children():
        if str(port) in " ".join(child.cmdline()):
            for process in (child, *child.children(recursive=True)):
                total += process.memory_full_info().pss
    return total / 1e6


def measure(shape: str, cases: list[str], commands: dict[str, str], rounds: int, folder: Path) -> list[Engine]:
    """All engines on one checkpoint: one warm-up round per case and engine, then the rounds, in turns."""
    model = checkpoints.make(shape, folder)
    with ExitStack() as stack:
        found = [
            start(stack, name, command, model, folder / f"{shape}-{name}.log") for name, command in commands.items()
        ]
        for case in cases:
            for number in range(rounds + 1):
                turns = found if number % 2 else found[::-1]
                for engine in turns:
                    figures = run("127.0.0.1", engine.port, "bench", dataclasses.replace(CASES[case][1], seed=number))
                    if number:
                        row = dataclasses.asdict(figures) | {"load_average": os.getloadavg()[0]}
                        engine.figures.setdefault(case, []).append(row)
        for engine in found:
            engine.memory_mb = memory_mb(engine.port)
    return found


def table(found: list[Engine], cases: list[str]) -> list[dict[str, Any]]:
    """One row per case and figure: the medians, and by how much MoonLang is better than each peer."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        for figure in CASES[case][2]:
            medians = {engine.name: statistics.median(row[figure] for row in engine.figures[case]) for engine in found}
            rows.append({"case": case, "figure": figure, "medians": medians, "ratios": ratios(figure, medians)})
    shape = CASES[cases[0]][0]
    for figure in ("start_s", "memory_mb"):
        medians = {engine.name: getattr(engine, figure) for engine in found}
        rows.append({"case": shape, "figure": figure, "medians": medians, "ratios": ratios("start_s", medians)})
    return rows


def ratios(figure: str, medians: dict[str, float]) -> dict[str, float]:
    ours = medians[OURS]
    if not ours:  # not measured: a stream without text has no times between its tokens
        return {}
    peers = {name: value for name, value in medians.items() if name != OURS}
    if figure in _LESS_IS_BETTER:
        return {name: value / ours for name, value in peers.items()}
    return {name: ours / value for name, value in peers.items()}


def show(row: dict[str, Any]) -> None:
    values = " ".join(f"{name}={value:.4g}" for name, value in row["medians"].items())
    better = " ".join(f"{value:.2f}x {name}" for name, value in row["ratios"].items())
    print(f"{row['case']:10} {row['figure']:14} {values:50} {better}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--peer", action="append", default=[], help="name=command, {model} and {port} are filled in")
    parser.add_argument("--moonlang", default=engines.MOONLANG, help="command of MoonLang")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the result file")
    args = parser.parse_args()
    commands = {OURS: args.moonlang} | dict(peer.split("=", 1) for peer in args.peer)
    chosen = args.cases.split(",")
    args.models.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": engines.machine(), "commands": commands, "table": [], "rounds": {}}
    for shape in dict.fromkeys(CASES[case][0] for case in chosen):
        cases = [case for case in chosen if CASES[case][0] == shape]
        found = measure(shape, cases, commands, args.rounds, args.models)
        rows = table(found, cases)
        for row in rows:
            show(row)
        report["table"] += rows
        report["rounds"][shape] = [dataclasses.asdict(engine) for engine in found]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-{datetime.now(UTC):%Y-%m-%dT%H%M}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
