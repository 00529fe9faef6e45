"""A model whose keys and values are kept in narrow types stays close to itself with a cache of its own type."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import read_config, write_checkpoint
from plan_driver import Job, PlanDriver

from moonlang.config.host import cpu_kernels
from moonlang.config.server_args import ServerArgs
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.runner import ModelRunner
from moonlang.models.registry import specs

VOCAB, PAGE, PROMPT = 256, 16, 300
EVERYTHING = LogprobSpec(0, 0, tuple(range(VOCAB)))
# Mean error of a log probability, as a share of their spread: keys and values have 8, 3 and 2 bits of mantissa.
ALLOWED = {"int8": 0.02, "fp8_e4m3": 0.06, "fp8_e5m2": 0.12}

pytestmark = pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")


def runner(folder: Path, kv_dtype: str) -> ModelRunner:
    args = ServerArgs.create(
        model_path=str(folder), device="cpu", dtype="float32", kv_cache_dtype=kv_dtype, page_size=PAGE,
        max_total_tokens=1024, max_running_requests=4, attention_backend="cpu",
    )  # fmt: skip
    return ModelRunner(read_config(folder, "float32"), args)


def logprobs(model: ModelRunner) -> np.ndarray:
    """Of every token of the vocabulary after every position of a prompt: [positions, V]."""
    words = random.Random(0)
    driver = PlanDriver(model, 128)
    tokens = [words.randrange(2, VOCAB) for _ in range(PROMPT)]
    job = driver.add(Job(tokens, SamplingParams(temperature=0.0), 2, EVERYTHING))
    driver.run()
    return np.array([[value for value, _ in entry.ids] for entry in job.prompt[1:]])


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp(request.param)
    write_checkpoint(found, specs()[request.param].tiny())
    return found


def test_log_probabilities_stay_close(folder: Path) -> None:
    exact = logprobs(runner(folder, "auto"))
    for kv_dtype, allowed in ALLOWED.items():
        error = np.abs(logprobs(runner(folder, kv_dtype)) - exact).mean() / exact.std()
        assert 0 < error < allowed, kv_dtype


def test_a_narrow_page_is_smaller_and_has_another_digest(folder: Path) -> None:
    models = {name: runner(folder, name).schema for name in ("auto", *ALLOWED)}
    plain = models.pop("auto")
    assert len({schema.digest() for schema in (plain, *models.values())}) == 4
    for name, schema in models.items():
        row = schema.head_dim + (4 if name == "int8" else 0)
        assert schema.page_bytes * plain.head_dim * 4 == plain.page_bytes * row
