"""A forward that tells how far it is, on the path of the kernels and on that of torch."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import Row, SlotStart, StepPlan
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.executor import ThreadExecutor
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.runner import ModelRunner

LAYERS = 6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


@pytest.fixture(scope="module", params=["cpu", "torch_native"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder: Path = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, CONFIG)
    args = ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        page_size=4,
        max_total_tokens=256,
        attention_backend=request.param,
        max_running_requests=4,
    )
    return ModelRunner(load_model_config(str(folder), args), args)


def plan(number: int, every: int) -> StepPlan:
    start = SlotStart(0, number, 8, tuple(range(8)), SamplingParams(temperature=0.0))
    return StepPlan(number, 0, (start,), (Row(0, number, 0, 8, tuple(range(8)), True, 0, (1, 2)),), every)


@pytest.mark.parametrize(("every", "reports"), [(0, 0), (1, 6), (2, 3), (4, 1), (6, 1), (7, 0)])
def test_reports(runner: ModelRunner, every: int, reports: int) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    progress = Progress(event)
    runner.run(plan(5, every), progress)
    count = os.eventfd_read(event) if select.select([event], [], [], 0)[0] else 0
    assert count == reports
    if every:
        assert progress.read() == (5, LAYERS // every * every)
    os.close(event)


def test_they_come_while_the_plan_runs(runner: ModelRunner) -> None:
    """The executor's descriptor is readable before the result is there."""
    executor = ThreadExecutor(runner)
    seen: list[int] = []
    results = 0
    for number in range(20):
        executor.submit(plan(number, 1))
        while not results:
            select.select([executor.fileno()], [], [], 10)
            found, layers = executor.progress()
            results = len(executor.poll())
            if found == number:
                seen.append(layers)
        results = 0
        assert executor.progress() == (number, LAYERS)
    executor.close()
    assert seen
