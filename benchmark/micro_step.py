"""Milliseconds of one decode step and of its parts, for two small shapes, with random weights.

    python benchmark/micro_step.py [--steps 300] [--threads 1] [--temperature 0]

layout: tensors from the plan; forward: the transformer; logits: the product with the vocabulary; sample; result: values
for the scheduler. Figures are medians over the steps, the total also as its fastest tenth. Nothing else should run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from moonlang.base import clock
from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import Row, SlotStart, StepPlan
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.plan_runner import StepTimes
from moonlang.model_executor.runner import ModelRunner

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and a batch. config: fields of a Llama config.json."""

    name: str
    rows: int
    config: dict[str, Any]


def llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }


SHAPES = (
    Shape("T: 1 layer, vocabulary 16384, 64 rows", 64, llama(1, 64, 2, 2, 128, 16384)),
    Shape("tiny: 4 layers, vocabulary 1024, 16 rows", 16, llama(4, 256, 8, 4, 512, 1024)),
)


def runner_for(shape: Shape, folder: Path) -> ModelRunner:
    (folder / "config.json").write_bytes(msgspec.json.encode(shape.config))
    args = ServerArgs.create(model_path=str(folder), load_format="dummy", page_size=PAGE_TOKENS, device="cpu")
    return ModelRunner(load_model_config(str(folder), args), args)


def plans(rows: int, context: int, steps: int, params: SamplingParams) -> Iterator[StepPlan]:
    """One prefill of all rows to `context` tokens, then decode steps."""
    pages = -(-(context + steps + 1) // PAGE_TOKENS)
    prompt = tuple(range(3, context + 3))
    yield StepPlan(
        0,
        0,
        tuple(SlotStart(slot, 1, context, prompt, params) for slot in range(rows)),
        tuple(
            Row(slot, 1, 0, context, prompt, True, 0, tuple(range(1 + slot * pages, 1 + (slot + 1) * pages)))
            for slot in range(rows)
        ),
    )
    for step in range(steps):
        yield StepPlan(step + 1, 0, (), tuple(Row(slot, 1, context + step, 1, (), True) for slot in range(rows)))


def measure(shape: Shape, steps: int, temperature: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner = runner_for(shape, Path(folder))
    totals: list[int] = []
    parts: list[StepTimes] = []
    params = SamplingParams(temperature=temperature, ignore_eos=True)
    # The context passes 100 tokens in the middle of the measurement.
    for number, plan in enumerate(plans(shape.rows, max(8, 100 - steps // 2), steps, params)):
        begin = clock.monotonic_ns()
        runner.run(plan)
        if number > steps // 10:
            totals.append(clock.monotonic_ns() - begin)
            parts.append(runner.times)
    total, fast = statistics.median(totals), statistics.quantiles(totals, n=10)[0]
    columns = zip(StepTimes._fields, zip(*parts, strict=True), strict=True)
    split = ", ".join(f"{name} {statistics.median(column) / 1e6:.3f}" for name, column in columns)
    speed = shape.rows * 1e9 / total
    print(f"{shape.name}: {total / 1e6:.3f} ms, fast {fast / 1e6:.3f} ms ({speed:,.0f} tokens/s): {split}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="decode steps per shape")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in SHAPES:
        measure(shape, args.steps, args.temperature)


if __name__ == "__main__":
    main()
