"""Law 6 over the stages of a pipeline: they compute the bits of one process that has all layers.

Stages are threads here; test/e2e/test_pipeline.py has the processes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import read_config, write_checkpoint
from plan_driver import Job, PlanDriver
from rank_threads import JOIN_S, on_every_rank

from moonlang.config.host import cpu_kernels
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.core.seat import Seat
from moonlang.distributed.join import join
from moonlang.model_executor.runner import ModelRunner
from moonlang.models.registry import specs
from moonlang.roles.experts import open_exchange

VOCAB, NEW = 256, 5
GREEDY, DRAWN = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.9, seed=5)

KERNELS = pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
CASES = [
    pytest.param("llama", "float32", 3, 1, "cpu", "none", marks=KERNELS),  # a layer each
    pytest.param("llama", "bfloat16", 2, 2, "cpu", "none", marks=KERNELS),  # one and two layers
    pytest.param("qwen3", "bfloat16", 2, 1, "cpu", "none", marks=KERNELS),  # a head that is the embedding
    pytest.param("gemma3", "bfloat16", 2, 1, "cpu", "none", marks=KERNELS),  # two kinds of layers, a scaled embedding
    pytest.param("qwen2_moe", "float32", 2, 1, "cpu", "none", marks=KERNELS),
    pytest.param("deepseek_v3", "bfloat16", 2, 1, "cpu", "none", marks=KERNELS),  # dense layers first; latents
    pytest.param(
        "qwen3_moe", "bfloat16", 2, 2, "cpu", "mooncake", marks=KERNELS
    ),  # experts in the ranks of a stage, which move
    pytest.param("deepseek_v3", "bfloat16", 2, 2, "cpu", "torch", marks=KERNELS),  # the first stage may have none
    pytest.param("llama", "float32", 2, 1, "torch_native", "none"),
    pytest.param("qwen3", "bfloat16", 2, 1, "torch_native", "none"),
]


def arguments(folder: Path, dtype: str, attention: str, exchange: str) -> ServerArgs:
    return ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype=dtype,
        page_size=16,
        max_total_tokens=1024,
        max_running_requests=8,
        attention_backend=attention,
        moe_a2a_backend=exchange,
        enable_eplb=exchange == "mooncake",
        eplb_rebalance_num_iterations=1,
    )


def runner(
    folder: Path, dtype: str, attention: str, rank: int, stages: int, tp: int, exchange: str = "none"
) -> ModelRunner:
    config, args = read_config(folder, dtype), arguments(folder, dtype, attention, exchange)
    if stages == 1:
        return ModelRunner(config, args)
    backend = "shared_memory" if attention == "cpu" else "gloo"
    seat = Seat(
        rank=rank,
        size=stages * tp,
        stages=stages,
        meeting=str(folder / "meeting"),
        plans="",
        backend=backend,
        patience_s=60,
        local_size=stages * tp,
    )
    joined = join(seat)
    copies = 2 if args.enable_eplb else 0
    config = dataclasses.replace(config, shard=joined.shard, stage=joined.stage, redundant_experts=copies)
    way = joined.group and open_exchange(args, config, seat.of_stage(), joined.group)
    return ModelRunner(config, args, group=joined.group, exchange=way, pipe=joined.pipe)


def answers(runner: Any) -> list[object]:
    """Tokens of rows in chunks, greedy and drawn, and the log probabilities of all tokens at all positions."""
    driver = PlanDriver(runner, chunk=48, depth=1)
    everything = LogprobSpec(0, 0, tuple(range(VOCAB)))
    jobs = [
        driver.add(Job([2 + (7 * i + length) % (VOCAB - 2) for i in range(length)], params, NEW, logprob))
        for length in (1, 17, 70)
        for params, logprob in ((GREEDY, everything), (DRAWN, None))
    ]
    driver.run()
    return [(job.tokens, job.prompt, job.output, job.error) for job in jobs]


@pytest.mark.parametrize(("name", "dtype", "stages", "tp", "attention", "exchange"), CASES, ids=str)
def test_the_same_bits(
    name: str, dtype: str, stages: int, tp: int, attention: str, exchange: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, dtype, attention, 0, 1, 1))
    ranks, last = stages * tp, (stages - 1) * tp
    plans: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in range(ranks)]
    results: SimpleQueue[StepResult] = SimpleQueue()

    def work(rank: int) -> list[object]:
        mine = runner(tmp_path, dtype, attention, rank, stages, tp, exchange)
        assert mine.schema.num_layers == len(mine.config.layers) < mine.config.num_layers
        assert mine.whole_schema.num_layers == mine.config.num_layers
        assert (mine.balancer is not None) == (exchange == "mooncake")
        if rank == 0:
            return lead(mine)
        while (plan := plans[rank].get(timeout=JOIN_S)) is not None:
            result = mine.run(plan)
            if rank == last:
                results.put(result)
        return []

    def lead(mine: ModelRunner) -> list[object]:
        def run(plan: StepPlan) -> StepResult:
            for queue in plans[1:]:
                queue.put(plan)
            assert mine.run(plan).rows == ()
            return results.get(timeout=JOIN_S)

        sizes = {"schema": mine.schema, "num_pages": mine.num_pages, "max_slots": mine.max_slots}
        found = answers(SimpleNamespace(run=run, **sizes))
        for queue in plans[1:]:
            queue.put(None)
        return found

    assert on_every_rank(ranks, work)[0] == alone
