"""How long after prefill's last computed token can decode go on, and how long when everything is sent at the end?

    python benchmark/pd/handover.py --model-path FOLDER [--tokens 2048] [--rounds 5] [--backend mooncake]

Two pairs of servers take turns on fresh prompts: one pushes groups of layers as they are computed, the other everything
after the step. The figure is `total_moving_ns` of the prefill instance: from the last computed token to the last page
sent and acknowledged, whose checksum decode has been verifying on the way.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
from pd.deployment import Deployment, serving_pairs

HERE = Path(__file__).parent
WARM_UP = 2  # rounds that meet pages which nobody has touched before: a virtual machine takes its time to back them


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def moving(url: str) -> tuple[int, int]:
    """(nanoseconds of moving, pairs moved) so far, of one instance."""
    pairs = call(f"{url}/server_info")["internal_states"][0]["load"]["pairs"]
    return pairs["total_moving_ns"], pairs["total_moved"]


def handover_ms(pairs: Deployment, ids: list[int]) -> float:
    """One request through a pair."""
    before_ns, before = moving(pairs.prefill[0])
    sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    call(f"{pairs.router}/generate", {"input_ids": ids, "sampling_params": sampling})
    after_ns, after = moving(pairs.prefill[0])
    if after != before + 1:
        raise RuntimeError(f"{after - before} pairs have moved, not one")
    return (after_ns - before_ns) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="mooncake")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "pd_handover.json")
    args = parser.parse_args()
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    rng = random.Random(3)
    common = f"--max-total-tokens {args.tokens + 1024} --max-running-requests 2 --chunked-prefill-size {args.tokens}"
    ways = {"groups of layers": "", "all at the end": "--disaggregation-layer-groups 1"}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        pairs: dict[str, Deployment] = {}
        for way, option in ways.items():
            logs = Path(name) / way
            logs.mkdir()
            deployment = serving_pairs(args.model_path, logs, backend=args.backend, options=f"{common} {option}")
            pairs[way] = stack.enter_context(deployment)
        for turn in range(WARM_UP + args.rounds):
            for way in ways:
                ms = handover_ms(pairs[way], [rng.randrange(10, vocab) for _ in range(args.tokens)])
                if turn >= WARM_UP:
                    found[way].append(ms)
    medians = {way: statistics.median(values) for way, values in found.items()}
    for way, ms in medians.items():
        print(f"{way:17} {ms:8.1f} ms")
    if medians["all at the end"]:
        print(f"ratio: {medians['groups of layers'] / medians['all at the end']:.0%}")
    args.out.write_text(
        json.dumps({"machine": engines.machine(), "backend": args.backend, "ms": found}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
