"""Experts that move while they serve: the bits of one rank wherever they are, and however many copies there are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from rank_runners import NEVER, answers, runner
from rank_threads import on_every_rank

from moonlang.config.host import cpu_kernels
from moonlang.model_executor.runner import ModelRunner
from moonlang.models.registry import specs
from moonlang.moe.placement import Placement

kernels = pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")

CASES = [
    ("mixtral", 2, "mooncake", None),
    ("qwen3_moe", 2, "mooncake_tcp", None),
    ("deepseek_v3", 4, "torch", None),
    ("gpt_oss", 2, "mooncake", None),  # experts with biases
    ("qwen2_moe", 2, "torch", "int8"),
]


def scattered(mine: ModelRunner, ranks: int, turn: int) -> list[Placement]:
    """By layer, experts in some order, and copies of some: on all ranks the same."""
    chosen, found = random.Random(turn), []
    for layer in mine.expert_layers:
        experts = layer.placement.experts
        slots = [*range(experts), *(chosen.randrange(experts) for _ in range(turn))]
        chosen.shuffle(slots)
        found.append(Placement(tuple(tuple(slots[rank::ranks]) for rank in range(ranks))))
    return found


def moved(mine: ModelRunner, ranks: int, turn: int) -> list[object]:
    """The answers with experts somewhere else; rank 0's tell."""
    mine.hold(scattered(mine, ranks, turn))
    return answers(mine)


@kernels
@pytest.mark.parametrize(("name", "size", "backend", "quantization"), CASES, ids=str)
def test_the_same_bits_wherever_they_are(
    name: str, size: int, backend: str, quantization: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1, quantization=quantization))

    def work(rank: int) -> list[list[object]]:
        mine = runner(
            *(tmp_path, "bfloat16", rank, size),
            quantization=quantization,
            exchange=backend,
            redundant=2,
            balance_every=NEVER,
        )
        assert mine.computed_by.startswith("CPU kernels")
        assert all(len(layer.placement.copies(0)) == 2 for layer in mine.expert_layers)
        return [answers(mine), *(moved(mine, size, turn) for turn in (3, 0))]

    assert on_every_rank(size, work)[0] == [alone] * 3


@kernels
def test_int8_on_the_way(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()["mixtral"].tiny())

    def work(rank: int) -> list[list[object]]:
        mine = runner(
            tmp_path, "bfloat16", rank, 2, exchange="mooncake", payload="int8", redundant=2, balance_every=NEVER
        )
        return [answers(mine), moved(mine, 2, 3)]

    first, second = on_every_rank(2, work)[0]
    assert first == second


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_torch_path(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native"))

    def work(rank: int) -> list[list[object]]:
        mine = runner(tmp_path, "float32", rank, 2, "torch_native", exchange="torch", redundant=2, balance_every=NEVER)
        return [moved(mine, 2, turn) for turn in (3, 0)]

    for found in on_every_rank(2, work)[0]:
        assert [job[0] for job in found] == [job[0] for job in alone]  # type: ignore[index]


@kernels
@pytest.mark.parametrize("backend", ["torch", "mooncake"])
def test_balanced_between_steps(backend: str, tmp_path: Path) -> None:
    """Requests in flight keep their bits, and all ranks come to the same placement."""
    write_checkpoint(tmp_path, specs()["mixtral"].tiny())
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))

    def work(rank: int) -> tuple[list[list[object]], list[Placement]]:
        mine = runner(tmp_path, "bfloat16", rank, 2, exchange=backend, redundant=2, balance_every=2)
        assert mine.balancer is not None
        found = []
        while not mine.balancer.totals.rebalances:
            found.append(answers(mine))
        assert mine.balancer.totals.after > mine.balancer.totals.before
        return [*found, answers(mine)], [layer.placement for layer in mine.expert_layers]

    (found, first), (_, second) = on_every_rank(2, work)
    assert all(one == alone for one in found)
    assert first == second
