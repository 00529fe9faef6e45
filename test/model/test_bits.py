"""Law 6 through the ModelRunner: a sequence's logits have the same bits whatever else the engine does.

Alone, among 32 rows, in chunks of any size, on a warm cache, with one thread or two. Compared are the log probabilities
of every token of the vocabulary, at every position of prompt and output, and the tokens. A narrow KV cache rounds keys
and values before anybody reads them, so it keeps the law too.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from checkpoints import read_config, write_checkpoint
from plan_driver import Job, PlanDriver

from moonlang.config.host import cpu_kernels
from moonlang.config.server_args import ServerArgs
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor.runner import ModelRunner
from moonlang.models.registry import specs

VOCAB, NEW, PAGE = 256, 6, 16
GREEDY = SamplingParams(temperature=0.0)
EVERYTHING = LogprobSpec(0, 0, tuple(range(VOCAB)))
Answer = tuple[list[int], list[tuple[tuple[float, int], ...]]]  # tokens; log probabilities of all tokens by position

pytestmark = pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")


PLAIN = [(name, dtype, "auto") for name in specs() for dtype in ("float32", "bfloat16")]
NARROW = [
    ("qwen3", "bfloat16", "fp8_e4m3"),
    ("deepseek_v3", "bfloat16", "fp8_e4m3"),
    ("llama", "float32", "fp8_e5m2"),
    ("gemma2", "bfloat16", "int8"),
]


@pytest.fixture(scope="module", params=PLAIN + NARROW, ids=str)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    name, dtype, kv_dtype = request.param
    folder: Path = tmp_path_factory.mktemp(name)
    write_checkpoint(folder, specs()[name].tiny())
    args = ServerArgs.create(
        model_path=str(folder),
        device="cpu",
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        page_size=PAGE,
        max_total_tokens=8192,
        max_running_requests=40,
        attention_backend="cpu",
    )
    found = ModelRunner(read_config(folder, dtype), args)
    assert found.computed_by.startswith("CPU kernels")
    return found


def prompt(length: int, seed: int = 0) -> list[int]:
    words = random.Random(seed)
    return [words.randrange(2, VOCAB) for _ in range(length)]


def answer(job: Job) -> Answer:
    return job.tokens[job.prompt_len :], [entry.ids for entry in (*job.prompt, *job.output)]


def alone(runner: ModelRunner, tokens: list[int], chunk: int = 1 << 20) -> Answer:
    driver = PlanDriver(runner, chunk)
    job = driver.add(Job(list(tokens), GREEDY, NEW, EVERYTHING))
    driver.run()
    return answer(job)


@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_chunks(runner: ModelRunner, chunk: int) -> None:
    tokens = prompt(400)
    assert alone(runner, tokens, chunk) == alone(runner, tokens)


def test_company_of_32_rows(runner: ModelRunner) -> None:
    lengths = [1, 3, 15, 16, 17, 33, 90, 200]
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    driver = PlanDriver(runner, 40)
    jobs = [driver.add(Job(list(tokens), GREEDY, NEW, EVERYTHING)) for tokens in prompts]
    for seed in range(32 - len(jobs)):
        driver.add(Job(prompt(1 + 7 * seed, 100 + seed), SamplingParams(temperature=1.0, seed=seed), NEW))
    driver.run()
    assert [answer(job) for job in jobs] == [alone(runner, tokens) for tokens in prompts]


def test_warm_cache(runner: ModelRunner) -> None:
    """The prefix pages are those of another job, computed in other chunks, and read by two rows at once."""
    tokens = prompt(300)
    cold = alone(runner, tokens)
    driver = PlanDriver(runner, 48)
    first = driver.add(Job([*tokens[:280], 5, 6, 7], GREEDY, NEW))
    driver.run()
    shared = first.pages[: 280 // PAGE]
    driver.free_pages = [page for page in driver.free_pages if page not in shared]
    jobs = [driver.add(Job(list(tokens), GREEDY, NEW, EVERYTHING, shared=shared)) for _ in range(2)]
    driver.run()
    for job in jobs:
        found, logprobs = answer(job)
        computed = len(tokens) - len(shared) * PAGE - 1 + NEW
        assert (found, logprobs[-computed:]) == (cold[0], cold[1][-computed:])


def test_threads(runner: ModelRunner) -> None:
    import sgl_kernel

    before, tokens, found = sgl_kernel.threads(), prompt(400), []
    try:
        for threads in (1, 2, 3):
            sgl_kernel.set_threads(threads)
            found.append(alone(runner, tokens, 150))
    finally:
        sgl_kernel.set_threads(before)
    assert found[0] == found[1] == found[2]
