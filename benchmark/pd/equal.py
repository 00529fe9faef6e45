"""Does a prefill/decode pair answer as one server does? Tokens and log probabilities, greedy and with seeds.

    python benchmark/pd/equal.py --model-path FOLDER [--model-path FOLDER]... [--prompts 200] [--backend mooncake]

Each model is served alone and disaggregated; the same random prompts go to both, several at a time, half of them
sampled greedily and half with a seed. Exit status 1 when an answer differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
from pd.deployment import serving_pairs

HERE = Path(__file__).parent
NEW_TOKENS = 24
AT_ONCE = 8


def bodies(count: int, vocab: int, seed: int) -> list[dict[str, Any]]:
    """Requests of /generate: random prompts, some of them sharing a beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(10, vocab) for _ in range(64)]
    found = []
    for i in range(count):
        ids = (common if i % 3 == 0 else []) + [rng.randrange(10, vocab) for _ in range(rng.randrange(2, 400))]
        sampling: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        sampling |= {"temperature": 0} if i % 2 else {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 1000 + i}
        found.append({"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 3})
    return found


def answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What must be equal: tokens and log probabilities of the output."""
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        meta = json.load(reply)["meta_info"]
    return {
        "tokens": [entry[1] for entry in meta["output_token_logprobs"]],
        "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
        "top": meta["output_top_logprobs"],
        "finish": meta["finish_reason"],
    }


def answers(url: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda body: answer(url, body), requests))


def compare(model: Path, prompts: int, backend: str, logs: Path) -> dict[str, Any]:
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    requests = bodies(prompts, vocab, seed=prompts)
    with engines.serving(engines.MOONLANG, model, logs / "alone.log") as server:
        alone = answers(f"http://127.0.0.1:{server.port}", requests)
    with serving_pairs(model, logs, backend=backend) as pairs:
        paired = answers(pairs.router, requests)
    halves = {"greedy": slice(1, None, 2), "seeded": slice(0, None, 2)}
    return {
        name: {
            "prompts": len(alone[half]),
            "tokens_equal": sum(a["tokens"] == b["tokens"] for a, b in zip(alone[half], paired[half], strict=True)),
            "bits_equal": sum(a == b for a, b in zip(alone[half], paired[half], strict=True)),
        }
        for name, half in halves.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, action="append", required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--backend", default="mooncake")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "pd_equal.json")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as logs:
        for model in args.model_path:
            found[model.name] = compare(model, args.prompts, args.backend, Path(logs))
            for half, row in found[model.name].items():
                print(f"{model.name:16} {half:7}", " ".join(f"{key}={value}" for key, value in row.items()))
    args.out.write_text(json.dumps({"machine": engines.machine(), "models": found}, indent=1) + "\n")
    return 0 if all(row["tokens_equal"] == row["prompts"] for model in found.values() for row in model.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
