"""What does it bring to balance experts? Two ranks, and a router that prefers some experts by far.

    python benchmark/moe/balance.py [--rounds 5] [--cases prefill,decode] [--out FILE]

The model is the small mixture of `random_checkpoints`, with rows of its routers made longer: the experts of long rows
are chosen most, and the longest are those of the first rank. Servers of two ranks take turns within each round, and are
stopped between their turns:

    fixed      experts stay where they are at the start
    balanced   --enable-eplb and two further copies in each layer; rounds count when experts have moved

A ratio is that of a round, the table shows medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import statistics
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import engines  # noqa: E402 - the folder of the benchmarks is no package
import load  # noqa: E402
import random_checkpoints  # noqa: E402

RANKS = "--tp-size 2 --moe-a2a-backend mooncake --enable-metrics"
WAYS = {
    "fixed": RANKS,
    "balanced": f"{RANKS} --enable-eplb --ep-num-redundant-experts 2 --eplb-rebalance-num-iterations 40 "
    "--eplb-min-rebalancing-utilization-threshold 0.9",
}
CASES = {
    "prefill": load.Load(requests=16, concurrency=4, input_len=512, output_len=1, stream=False),
    "decode": load.Load(requests=32, concurrency=16, input_len=32, output_len=64),
}
SHARES = (6.0, 0.5)  # of the first expert and the last: the length of its row, in between as a power
MOST_LOADS = 30  # until experts must have moved


def skewed(source: Path, folder: Path) -> Path:
    """The checkpoint with routers that prefer the first experts."""
    path = folder / f"{source.name}-skewed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            lengths = torch.logspace(*torch.tensor(SHARES).log10().tolist(), len(weight)).unsqueeze(1)
            tensors[name] = (weight.float() * lengths).to(weight.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def metric(server: engines.Server, name: str) -> float:
    """0 when there is none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as response:
        found = re.search(rf"^{name}{{.*}} (.*)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def turn(server: engines.Server, case: str, seed: int) -> load.Figures:
    server.resume()
    try:
        return load.run("127.0.0.1", server.port, "bench", dataclasses.replace(CASES[case], seed=seed))
    finally:
        server.pause()


def move_experts(server: engines.Server) -> dict[str, float]:
    """Serve until they have been placed anew; how balanced the ranks were, and are."""
    for number in range(MOST_LOADS):
        turn(server, "prefill", 1000 + number)
        server.resume()
        if metric(server, "moonlang:eplb_rebalances_total") > 0:
            names = ("before", "after")
            found = {name: metric(server, f"moonlang:eplb_balancedness_{name}") for name in names}
            server.pause()
            return found
        server.pause()
    raise SystemExit("Experts have not moved.")


def measure(cases: list[str], rounds: int, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Balancedness; and by case and way the figures of each round, after one to warm up."""
    model = skewed(random_checkpoints.make("E", folder), folder)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {case: {way: [] for way in WAYS} for case in cases}
    with ExitStack() as stack:
        servers = {}
        for way, flags in WAYS.items():
            log = folder / f"balance-{way}.log"
            servers[way] = stack.enter_context(engines.serving(f"{engines.MOONLANG} {flags}", model, log))
            servers[way].pause()
            stack.callback(servers[way].resume)
        balancedness = move_experts(servers["balanced"])
        for number in range(rounds + 1):
            for case in cases:
                for way, server in servers.items():
                    figures = turn(server, case, number)
                    if number:
                        found[case][way].append(dataclasses.asdict(figures))
    return balancedness, found


def summary(case: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Printed, and for the result file."""
    rates = {way: statistics.median(row["requests_per_s"] for row in rows) for way, rows in found.items()}
    pairs = zip(found["balanced"], found["fixed"], strict=True)
    ratio = statistics.median(one["requests_per_s"] / other["requests_per_s"] for one, other in pairs)
    print(f"{case}: fixed {rates['fixed']:.2f}, balanced {rates['balanced']:.2f} requests/s: {ratio:.2f}x")
    return rates | {"balanced/fixed": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "moe_balance.json")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    balancedness, rounds = measure(args.cases.split(","), args.rounds, args.models)
    print(f"balancedness: {balancedness['before']:.3f} -> {balancedness['after']:.3f}")
    medians = {case: summary(case, found) for case, found in rounds.items()}
    result = {"machine": engines.machine(), "balancedness": balancedness, "medians": medians, "rounds": rounds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
