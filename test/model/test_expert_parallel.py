"""Experts on several ranks: the bits of one rank, whatever carries the tokens. Ranks are threads here."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from rank_runners import answers, runner
from rank_threads import on_every_rank

from moonlang.config.host import cpu_kernels
from moonlang.models.registry import specs

CASES = [
    ("mixtral", "bfloat16", 2, "mooncake", False),
    ("mixtral", "float32", 4, "mooncake", True),  # one expert each, and halves that overlap
    ("qwen3_moe", "bfloat16", 2, "mooncake_tcp", False),
    ("qwen3_moe", "bfloat16", 4, "torch", False),
    ("qwen2_moe", "bfloat16", 2, "mooncake", True),  # an expert that every token visits
    ("deepseek_v3", "bfloat16", 2, "mooncake", False),  # a bias in the choice
    ("deepseek_v3", "bfloat16", 4, "torch", False),
    ("gpt_oss", "bfloat16", 2, "mooncake", True),  # experts with biases
]


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(("name", "dtype", "size", "backend", "overlap"), CASES, ids=str)
def test_the_same_bits(name: str, dtype: str, size: int, backend: str, overlap: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, dtype, 0, 1))

    def work(rank: int) -> list[object]:
        mine = runner(tmp_path, dtype, rank, size, exchange=backend, overlap=overlap)
        assert mine.computed_by.startswith("CPU kernels")
        return answers(mine)

    assert on_every_rank(size, work)[0] == alone


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
def test_dense_layers_whole_in_every_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()["qwen3_moe"].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))

    def work(rank: int) -> list[object]:
        return answers(runner(tmp_path, "bfloat16", rank, 2, exchange="mooncake", dense_whole=True))

    assert on_every_rank(2, work)[0] == alone


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
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


@pytest.mark.parametrize("backend", ["torch", "mooncake"])
def test_the_torch_path(backend: str, tmp_path: Path) -> None:
    """The same as all ranks with all tokens; against one rank the tokens stay."""
    write_checkpoint(tmp_path, specs()["mixtral"].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native"))
    found = on_every_rank(
        2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, "torch_native", exchange=backend))
    )[0]
    assert [job[0] for job in found] == [job[0] for job in alone]  # type: ignore[index]
