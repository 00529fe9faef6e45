"""Experts on several ranks: the bits of one rank, whatever carries the tokens. Ranks are threads here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from packers import write_mxfp4
from plan_driver import Job, PlanDriver
from rank_runners import GREEDY, NEW, answers, runner
from rank_threads import on_every_rank
from torch import nn

from moonlang.config.host import cpu_kernels
from moonlang.models.registry import specs

COUNTS = {"num_experts", "num_local_experts", "n_routed_experts"}
MODELS = [name for name, spec in specs().items() if COUNTS & {*spec.tiny()}]
WAYS = [("none", False), *((backend, overlap) for backend in ("torch", "mooncake") for overlap in (False, True))]
STEPS = ((1, 17, 130), 128)  # prompts and the longest chunk: so many tokens in a step are cut in halves by 4 ranks too
KERNELS = pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A checkpoint, and the answers of one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, specs()[request.param].tiny())
    return folder, answers(runner(folder, "bfloat16", 0, 1), *STEPS)


@KERNELS
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("backend", "overlap"), WAYS)
def test_the_same_bits(model: tuple[Path, list[object]], size: int, backend: str, overlap: bool) -> None:
    """Every model with experts, every way for its tokens. overlap: halves of a batch travel while others compute."""
    folder, alone = model

    def work(rank: int) -> list[object]:
        mine = runner(folder, "bfloat16", rank, size, exchange=backend, overlap=overlap)
        assert mine.computed_by.startswith("CPU kernels")
        return answers(mine, *STEPS)

    assert on_every_rank(size, work)[0] == alone


@KERNELS
def test_the_same_bits_between_hosts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()["qwen3_moe"].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1))
    found = on_every_rank(2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, exchange="mooncake_tcp")))
    assert found[0] == alone


@KERNELS
def test_experts_in_four_bits(tmp_path: Path) -> None:
    """gpt-oss as it is published."""
    write_mxfp4(tmp_path, specs()["gpt_oss"].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))
    for size in (2, 4):
        found = on_every_rank(
            size, lambda rank, size=size: answers(runner(tmp_path, "bfloat16", rank, size, exchange="mooncake"))
        )
        assert found[0] == alone


@KERNELS
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, specs()[name].tiny())
    prompts = [list(range(3, 3 + length)) for length in (5, 70)]

    def work(rank: int) -> list[list[int]]:
        driver = PlanDriver(runner(tmp_path, "float32", rank, 4, exchange="mooncake", overlap=True), chunk=48)
        jobs = [driver.add(Job(list(prompt), GREEDY, NEW)) for prompt in prompts]
        driver.run()
        return [job.tokens for job in jobs]

    assert on_every_rank(4, work)[0] == [_continued(reference, prompt) for prompt in prompts]


def _continued(reference: nn.Module, prompt: list[int]) -> list[int]:
    """With the most probable tokens, one whole forward for each."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@KERNELS
def test_dense_layers_whole_in_every_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()["qwen3_moe"].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))

    def work(rank: int) -> list[object]:
        return answers(runner(tmp_path, "bfloat16", rank, 2, exchange="mooncake", dense_whole=True))

    assert on_every_rank(2, work)[0] == alone


@KERNELS
def test_int8_on_the_way(tmp_path: Path) -> None:
    """Other bits than without, but the same for every number of ranks."""
    write_checkpoint(tmp_path, specs()["mixtral"].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))

    def shared(size: int) -> list[object]:
        def work(rank: int) -> list[object]:
            return answers(runner(tmp_path, "bfloat16", rank, size, exchange="mooncake", payload="int8"))

        return on_every_rank(size, work)[0]

    two = shared(2)
    assert two == shared(4)
    assert two != alone


@pytest.mark.parametrize(("name", "backend"), [("mixtral", "torch"), ("mixtral", "mooncake"), ("gpt_oss", "mooncake")])
def test_the_torch_path(name: str, backend: str, tmp_path: Path) -> None:
    """The same as all ranks with all tokens; against one rank the tokens stay."""
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native"))
    found = on_every_rank(
        2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, "torch_native", exchange=backend))
    )[0]
    assert [job[0] for job in found] == [job[0] for job in alone]  # type: ignore[index]
