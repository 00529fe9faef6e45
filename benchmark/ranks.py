"""What several processes make of one model: the throughput of ranks, stages and copies over that of one process.

    python benchmark/ranks.py [--rounds 5] [--shapes S,E] [--cases decode,prefill]

All have the same cores: a ratio of 1 means that sums over ranks, hand-overs between stages, tokens on their way to
experts, and a batch divided among copies cost nothing. Shape E is a mixture of experts. Servers take turns within each
round, and are stopped between their turns; ratios are those of a round, the table shows medians.
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
ALONE = "one process"
DENSE = {ALONE: "", "tp 2": "--tp-size 2", "pp 2": "--pp-size 2", "dp 2": "--dp-size 2"}
CARRIED = "--moe-a2a-backend mooncake --tp-size"
EXPERTS = {
    **DENSE,
    "tp 2 mooncake": f"{CARRIED} 2",
    "tp 2 dp 2 apart": f"{CARRIED} 2 --dp-size 2 --enable-dp-attention",
    "tp 4 dp 2 apart": f"{CARRIED} 4 --dp-size 2 --enable-dp-attention",
}
CASES = {
    "decode": load.Load(requests=32, concurrency=8, input_len=32, output_len=64),
    "many": load.Load(requests=96, concurrency=32, input_len=32, output_len=32),
    "prefill": load.Load(requests=16, concurrency=4, input_len=512, output_len=1, stream=False),
    "alone": load.Load(requests=4, concurrency=1, input_len=32, output_len=64),
}


Rounds = dict[str, dict[str, list[dict[str, Any]]]]


def measure(shape: str, cases: list[str], rounds: int, folder: Path) -> Rounds:
    """By case and way: the figures of each round, after one to warm up, with prompts that are new in every round."""
    model = random_checkpoints.make(shape, folder)
    ways = EXPERTS if "num_experts" in random_checkpoints.SHAPES[shape] else DENSE
    found: Rounds = {case: {way: [] for way in ways} for case in cases}
    with ExitStack() as stack:
        servers = {}
        for way, flags in ways.items():
            log = folder / f"ranks-{shape}-{way.replace(' ', '')}.log"
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


def report(shape: str, found: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """By case and way, medians; printed, too."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for case, ways in found.items():
        medians[case] = {
            way: {
                "ratio": ratio(rounds, ways[ALONE]),
                "requests_per_s": statistics.median(one["requests_per_s"] for one in rounds),
            }
            for way, rounds in ways.items()
        }
        for way, row in medians[case].items():
            print(f"{shape}  {case:8} {way:16} {row['requests_per_s']:8.2f} requests/s  {row['ratio']:.2f}", flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default="S,E", help=f"of {', '.join(random_checkpoints.SHAPES)}")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ranks.json")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {"machine": engines.machine(), "medians": {}, "rounds": {}}
    for shape in args.shapes.split(","):
        found = whole["rounds"][shape] = measure(shape, args.cases.split(","), args.rounds, args.models)
        whole["medians"][shape] = report(shape, found)
    args.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
