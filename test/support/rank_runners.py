"""ModelRunners of ranks that share a model, and what they answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from checkpoints import read_config
from expert_exchanges import join, open_exchange, seat
from plan_driver import Job, PlanDriver, Steps

from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import Shard
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.experts import exchange_spec

VOCAB, NEW = 256, 5
EVERYTHING = LogprobSpec(0, 0, tuple(range(VOCAB)))
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
LENGTHS = (1, 17, 70)
NEVER = 1 << 30


def runner(
    folder: Path,
    dtype: str,
    rank: int,
    size: int,
    attention: str = "cpu",
    quantization: str | None = None,
    exchange: str = "none",
    overlap: bool = False,
    dense_whole: bool = False,
    payload: str = "auto",
    redundant: int = 0,
    balance_every: int | None = None,
) -> ModelRunner:
    """exchange: a backend of `expert_exchanges`. payload: form of what travels. redundant: further copies of experts.
    balance_every: steps between two looks at their load; None: they stay where they are put."""
    args = ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype=dtype,
        page_size=16,
        max_total_tokens=1024,
        max_running_requests=8,
        attention_backend=attention,
        tp_size=size,
        quantization=quantization,
        moe_a2a_backend=exchange.partition("_")[0],
        enable_two_batch_overlap=overlap,
        deepep_dispatcher_output_dtype=payload,
        enable_eplb=balance_every is not None,
        eplb_rebalance_num_iterations=balance_every or NEVER,
        eplb_rebalance_layers_per_chunk=1,
    )
    config = read_config(folder, dtype, quantization=quantization)
    shard = Shard(rank, size)
    config = dataclasses.replace(config, shard=shard, dense_whole=dense_whole, redundant_experts=redundant)
    if size == 1:
        return ModelRunner(config, args)
    place = seat(folder, rank, size, "shared_memory" if attention == "cpu" else "gloo")
    group, spec = join(place), exchange_spec(args, config)
    return ModelRunner(config, args, None, group, spec and open_exchange(exchange, spec, place, group))


def answers(runner: Steps, lengths: tuple[int, ...] = LENGTHS, chunk: int = 48) -> list[object]:
    """Greedy and drawn tokens of several rows in chunks, and the log probabilities of all tokens at all positions."""
    driver = PlanDriver(runner, chunk)
    jobs = [
        driver.add(Job([2 + (7 * i + length) % (VOCAB - 2) for i in range(length)], params, NEW, logprob))
        for length in lengths
        for params, logprob in ((GREEDY, EVERYTHING), (DRAWN, None))
    ]
    driver.run()
    return [(job.tokens, job.prompt, job.output, job.error) for job in jobs]
