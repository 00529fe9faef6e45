"""What several processes make of one model: throughput of --tp-size 2 and --pp-size 2 over that of one process.

    python benchmark/ranks.py [--rounds 5] [--shape S] [--cases decode,prefill]

All have the same cores: a ratio of 1 means that sums over ranks and hand-overs between stages cost nothing. Servers
take turns within each round, and are stopped between their turns; ratios are those of a round, the table shows medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engines
import load
import random_checkpoints

HERE = Path(__file__).parent
WAYS = {"one process": "", "tp 2": "--tp-size 2", "pp 2": "--pp-size 2"}
CASES = {
    "decode": load.Load(requests=32, concurrency=8, input_len=32, output_len=64),
    "prefill": load.Load(requests=16, concurrency=4, input_len=512, output_len=1, stream=False),
    "alone": load.Load(requests=4, concurrency=1, input_len=32, output_len=64),
}


def measure(shape: str, cases: list[str], rounds: int, folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By case and way: the figures of each round, after one to warm up, with prompts that are new in every round."""
    model = random_checkpoints.make(shape, folder)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {case: {way: [] for way in WAYS} for case in cases}
    with ExitStack() as stack:
        servers = {}
        for way, flags in WAYS.items():
            log = folder / f"ranks-{way.replace(' ', '')}.log"
            servers[way] = stack.enter_context(engines.serving(f"{engines.MOONLANG} {flags}", model, log))
            servers[way].pause()
            stack.callback(servers[way].resume)
        for number in range(rounds + 1):
            for case in cases:
                for way, server in servers.items():
                    server.resume()
                    figures = load.run("127.0.0.1", server.port, "bench", dataclasses.replace(CASES[case], seed=number))
                    server.pause()
                    if number:
                        found[case][way].append(dataclasses.asdict(figures))
    return found


def ratio(rounds: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
    """Of the requests per second."""
    pairs = zip(rounds, alone, strict=True)
    return statistics.median(one["requests_per_s"] / other["requests_per_s"] for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="S", choices=sorted(random_checkpoints.SHAPES))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ranks.json")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    found = measure(args.shape, args.cases.split(","), args.rounds, args.models)
    report = {"machine": engines.machine(), "shape": args.shape, "ratios": {}, "rounds": found}
    for case, ways in found.items():
        ratios = {way: ratio(rounds, ways["one process"]) for way, rounds in ways.items()}
        report["ratios"][case] = ratios
        print(f"{case:8}", "  ".join(f"{way} {value:.2f}" for way, value in ratios.items()))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
