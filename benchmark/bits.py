"""How equal are the answers to one prompt, alone or in company, in chunks or whole, on a cold or a warm cache?

    python benchmark/bits.py [--model-path FOLDER] [--dtype float32] [--attention-backend torch_native] [--prompts 32]

Law 6 asks for equal bits. Greedy tokens and the log probabilities of the five best tokens of every step are compared
with those of the prompt alone, whole and cold. Exit status 1 when a token differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import engines

from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Generate
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.runner import ModelRunner
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig

HERE = Path(__file__).parent
NEW_TOKENS = 24
Answer = tuple[list[int], list[float]]  # tokens; log probabilities of the best five per step, flat


class Bench:
    """One model, many schedulers: each scenario starts with an empty cache."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.runner = ModelRunner(prepared.model, prepared.args)

    def scheduler(self, chunk_tokens: int) -> Scheduler:
        return Scheduler(
            SchedulerConfig(
                num_pages=self.runner.num_pages,
                page_size=self.runner.schema.page_size,
                context_length=self.prepared.model.context_length,
                max_running=self.runner.max_slots,
                chunk_tokens=chunk_tokens,
                depth=1,
            )
        )

    def answer(self, scheduler: Scheduler, prompts: dict[str, list[int]]) -> dict[str, Answer]:
        """All prompts at once, to the end."""
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        answers: dict[str, Answer] = {rid: ([], []) for rid in prompts}
        for rid, ids in prompts.items():
            scheduler.add(Generate(rid, ids, sampling, stream=True, logprob=LogprobSpec(top=5)), 0)
        while (plan := scheduler.plan(0)) is not None:
            for delta in scheduler.commit(self.runner.run(plan), 0):
                tokens, logprobs = answers[delta.rid]
                tokens += delta.tokens
                logprobs += [value for entry in delta.output for value, _ in entry.top]
        return answers

    def scenarios(self, prompts: dict[str, list[int]]) -> Iterator[tuple[str, dict[str, Answer]]]:
        whole = 1 << 20
        yield "alone", {rid: self.answer(self.scheduler(whole), {rid: ids})[rid] for rid, ids in prompts.items()}
        yield "together", self.answer(self.scheduler(whole), prompts)
        for chunk in (16, 64):
            one_by_one = {rid: self.answer(self.scheduler(chunk), {rid: ids})[rid] for rid, ids in prompts.items()}
            yield f"chunks of {chunk}", one_by_one
        warm = self.scheduler(whole)
        self.answer(warm, {f"before-{rid}": ids for rid, ids in prompts.items()})
        yield "together, warm", self.answer(warm, prompts)


def compare(base: dict[str, Answer], other: dict[str, Answer]) -> dict[str, float]:
    """Shares of answers with equal tokens and with equal bits, and the largest difference of a log probability."""
    same_tokens = sum(base[rid][0] == other[rid][0] for rid in base)
    same_bits = sum(base[rid] == other[rid] for rid in base)
    pairs = [
        pair for rid in base if base[rid][0] == other[rid][0] for pair in zip(base[rid][1], other[rid][1], strict=True)
    ]
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    return {"tokens_equal": same_tokens / len(base), "bits_equal": same_bits / len(base), "max_difference": worst}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention-backend", help="torch_native: the reference path, without the CPU kernels")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bits.json")
    args = parser.parse_args()
    wishes = ServerArgs.create(
        model_path=args.model_path,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        max_running_requests=64,
        max_total_tokens=60_000,
    )
    bench = Bench(prepare(wishes))
    rng = random.Random(7)
    vocab = bench.prepared.model.vocab_size
    prompts = {f"p{i}": [rng.randrange(10, vocab) for _ in range(rng.randrange(5, 300))] for i in range(args.prompts)}
    found = dict(bench.scenarios(prompts))
    report = {name: compare(found["alone"], answers) for name, answers in found.items() if name != "alone"}
    for name, row in report.items():
        print(f"{name:16}", " ".join(f"{key}={value:g}" for key, value in row.items()))
    resolved = bench.prepared.args
    key = f"{Path(resolved.served_model_name or '').name} {bench.prepared.model.dtype} {resolved.attention_backend}"
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps(old | {key: {"machine": engines.machine(), "scenarios": report}}, indent=1) + "\n")
    return 0 if all(row["tokens_equal"] == 1 for row in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
