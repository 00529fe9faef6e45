"""Law 6 over the stages of a pipeline: they compute the bits of one process that has all layers.

Stages are threads here; test/e2e/test_pipeline.py has the processes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from checkpoints import read_config, write_checkpoint
from live_server import free_port
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


class Ranks(NamedTuple):
    """`tp` ranks in each of `stages`, which are on as many hosts, or all on one."""

    stages: int
    tp: int = 1
    attention: str = "cpu"
    exchange: str = "none"
    quantization: str | None = None
    hosts: int = 1


CASES = [
    pytest.param("llama", "float32", Ranks(3), marks=KERNELS),  # a layer each
    pytest.param("llama", "bfloat16", Ranks(2, 2), marks=KERNELS),  # one and two layers
    pytest.param("qwen3", "bfloat16", Ranks(2), marks=KERNELS),  # a head that is the embedding
    pytest.param("gemma3", "bfloat16", Ranks(2), marks=KERNELS),  # two kinds of layers, a scaled embedding
    pytest.param("qwen2_moe", "float32", Ranks(2), marks=KERNELS),
    pytest.param("deepseek_v3", "bfloat16", Ranks(2), marks=KERNELS),  # dense layers first; latents
    pytest.param("qwen3", "bfloat16", Ranks(2, quantization="int8"), marks=KERNELS),
    # Experts in the ranks of a stage: some that move, and a stage that may have none.
    pytest.param("qwen3_moe", "bfloat16", Ranks(2, 2, exchange="mooncake"), marks=KERNELS),
    pytest.param("deepseek_v3", "bfloat16", Ranks(2, 2, exchange="torch"), marks=KERNELS),
    pytest.param("mixtral", "bfloat16", Ranks(2, 2, exchange="mooncake", hosts=2), marks=KERNELS),
    pytest.param("llama", "float32", Ranks(2, attention="torch_native")),
    pytest.param("qwen3", "bfloat16", Ranks(2, attention="torch_native")),
]


def arguments(folder: Path, dtype: str, ranks: Ranks) -> ServerArgs:
    return ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype=dtype,
        page_size=16,
        max_total_tokens=1024,
        max_running_requests=8,
        attention_backend=ranks.attention,
        quantization=ranks.quantization,
        moe_a2a_backend=ranks.exchange,
        enable_eplb=ranks.exchange == "mooncake",
        eplb_rebalance_num_iterations=1,
    )


def alone(folder: Path, dtype: str, ranks: Ranks) -> ModelRunner:
    """What is as good as all of them."""
    ranks = Ranks(1, attention=ranks.attention, quantization=ranks.quantization)
    return ModelRunner(read_config(folder, dtype, quantization=ranks.quantization), arguments(folder, dtype, ranks))


def runner(folder: Path, dtype: str, ranks: Ranks, rank: int, meeting: str) -> ModelRunner:
    args = arguments(folder, dtype, ranks)
    seat = Seat(
        rank=rank,
        size=ranks.stages * ranks.tp,
        stages=ranks.stages,
        meeting=meeting,
        plans="",
        backend="shared_memory" if ranks.attention == "cpu" and ranks.hosts == 1 else "gloo",
        patience_s=60,
        local_size=ranks.stages * ranks.tp // ranks.hosts,
    )
    joined = join(seat)
    config = dataclasses.replace(
        read_config(folder, dtype, quantization=ranks.quantization),
        shard=joined.shard,
        stage=joined.stage,
        redundant_experts=2 if args.enable_eplb else 0,
    )
    way = None if joined.group is None else open_exchange(args, config, seat.of_stage(), joined.group)
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


@pytest.mark.parametrize(("name", "dtype", "ranks"), CASES, ids=str)
def test_the_same_bits(name: str, dtype: str, ranks: Ranks, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    expected = answers(alone(tmp_path, dtype, ranks))
    meeting = str(tmp_path / "meeting") if ranks.hosts == 1 else f"tcp://127.0.0.1:{free_port()}"
    size, last = ranks.stages * ranks.tp, (ranks.stages - 1) * ranks.tp
    plans: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in range(size)]
    results: SimpleQueue[StepResult] = SimpleQueue()

    def work(rank: int) -> list[object]:
        mine = runner(tmp_path, dtype, ranks, rank, meeting)
        assert mine.schema.num_layers == len(mine.config.layers) < mine.config.num_layers
        assert mine.whole_schema.num_layers == mine.config.num_layers
        assert (mine.balancer is not None) == (ranks.exchange == "mooncake")
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

    assert on_every_rank(size, work)[0] == expected
