"""Law 6 over ranks: 2 or 4 ranks that share a model compute the bits of one that has it whole.

Ranks are threads here; test/e2e/test_tensor_parallel.py has the processes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from checkpoints import read_config, write_checkpoint
from plan_driver import Job, PlanDriver
from rank_threads import on_every_rank

from moonlang.base import registry
from moonlang.config.host import cpu_kernels
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import Shard
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.core.seat import Seat
from moonlang.model_executor.runner import ModelRunner
from moonlang.models.registry import specs

VOCAB, NEW = 256, 5
EVERYTHING = LogprobSpec(0, 0, tuple(range(VOCAB)))
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
LENGTHS = (1, 17, 70)

CASES = [
    ("llama", "float32", 2),
    ("llama", "bfloat16", 4),  # two KV heads, each held by two ranks; biases
    ("qwen3", "bfloat16", 2),  # a head that is the embedding
    ("mixtral", "float32", 2),
    ("mixtral", "bfloat16", 4),  # one expert each
    ("qwen2_moe", "bfloat16", 2),  # an expert that every token visits
    ("gemma2", "bfloat16", 4),  # a bounded head
]


def runner(folder: Path, dtype: str, rank: int, size: int, attention: str = "cpu") -> ModelRunner:
    args = ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype=dtype,
        page_size=16,
        max_total_tokens=1024,
        max_running_requests=8,
        attention_backend=attention,
        tp_size=size,
    )
    config = dataclasses.replace(read_config(folder, dtype), shard=Shard(rank, size))
    if size == 1:
        return ModelRunner(config, args)
    backend = "shared_memory" if attention == "cpu" else "gloo"
    meeting = str(folder / f"meeting-{size}-{backend}")
    seat = Seat(rank=rank, size=size, meeting=meeting, plans="", backend=backend, patience_s=60)
    return ModelRunner(config, args, group=registry.find("distributed", backend).BACKEND(seat))


def answers(runner: ModelRunner) -> list[object]:
    """Greedy and drawn tokens of several rows in chunks, and the log probabilities of all tokens at all positions."""
    driver = PlanDriver(runner, chunk=48)
    jobs = [
        driver.add(Job([2 + (7 * i + length) % (VOCAB - 2) for i in range(length)], params, NEW, logprob))
        for length in LENGTHS
        for params, logprob in ((GREEDY, EVERYTHING), (DRAWN, None))
    ]
    driver.run()
    return [(job.tokens, job.prompt, job.output, job.error) for job in jobs]


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(("name", "dtype", "size"), CASES, ids=str)
def test_the_same_bits(name: str, dtype: str, size: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, dtype, 0, 1))

    def work(rank: int) -> list[object]:
        mine = runner(tmp_path, dtype, rank, size)
        assert mine.computed_by.startswith("CPU kernels")
        heads = mine.regions[0].first_head, mine.schema.num_kv_heads
        assert heads == ((rank * 2 // size), max(1, 2 // size))
        return answers(mine)

    assert on_every_rank(size, work)[0] == alone


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_torch_path(name: str, tmp_path: Path) -> None:
    """Without kernels sums over ranks are rounded otherwise; the tokens stay."""
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native"))
    shared = on_every_rank(2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, "torch_native")))[0]
    assert [job[0] for job in shared] == [job[0] for job in alone]  # type: ignore[index]
