"""What everything around the model costs: small random models, many streaming clients, client on the same cores.

    python benchmark/engine_overhead.py [--rounds 3] [--cases L4,T64] [--peer 'vllm=vllm serve {model} --port {port}']

Engines take turns within each round (A B A B ...); the table shows medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engines
import load
import random_checkpoints

HERE = Path(__file__).parent
CASES: dict[str, tuple[str, load.Load]] = {
    "L4": ("L4", load.Load(requests=64, concurrency=16, input_len=128, output_len=64)),
    "T64": ("T", load.Load(requests=128, concurrency=64, input_len=32, output_len=128)),
    "T64-whole": ("T", load.Load(requests=128, concurrency=64, input_len=32, output_len=128, stream=False)),
    "T1": ("T", load.Load(requests=4, concurrency=1, input_len=32, output_len=128)),
}


def measure(
    name: str, commands: dict[str, str], rounds: int, folder: Path, burners: int
) -> dict[str, list[dict[str, Any]]]:
    """All engines on one case: one warm-up round each, then `rounds` interleaved rounds with fresh prompts."""
    shape, work = CASES[name]
    model = random_checkpoints.make(shape, folder)
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in commands}
    with ExitStack() as stack:
        servers = {
            engine: stack.enter_context(engines.serving(command, model, folder / f"{name}-{engine}.log"))
            for engine, command in commands.items()
        }
        for _ in range(burners):
            burner = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            stack.callback(burner.wait)
            stack.callback(burner.kill)
        for number in range(rounds + 1):
            for engine, server in servers.items():
                figures = load.run("127.0.0.1", server.port, "bench", dataclasses.replace(work, seed=number))
                if number:
                    found[engine].append(dataclasses.asdict(figures))
    return found


def medians(found: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in found) for key in found[0] if found[0][key] is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peer", action="append", default=[], help="name=command, {model} and {port} are filled in")
    parser.add_argument("--burners", type=int, default=0, help="other programs that keep a core busy meanwhile")
    parser.add_argument("--moonlang", default=engines.MOONLANG, help="command of MoonLang")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "engine_overhead.json")
    args = parser.parse_args()
    commands = {"moonlang": args.moonlang} | dict(peer.split("=", 1) for peer in args.peer)
    args.models.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": engines.machine(), "commands": commands, "burners": args.burners, "cases": {}}
    for name in args.cases.split(","):
        found = measure(name, commands, args.rounds, args.models, args.burners)
        report["cases"][name] = {engine: {"median": medians(rows), "rounds": rows} for engine, rows in found.items()}
        for engine, rows in found.items():
            print(f"{name:10} {engine:10}", " ".join(f"{key}={value:.1f}" for key, value in medians(rows).items()))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
