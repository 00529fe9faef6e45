"""Experts on one, two and four ranks, attention on one and two, tokens carried by all there is: the bits of one rank.

Ranks are threads here; `benchmark/moe/equal_outputs.py` asks the same of servers, and of pairs of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from rank_crews import Planned, on_every_replica
from rank_runners import answers

from moonlang.config.host import cpu_kernels
from moonlang.models.registry import specs

MODELS = ("deepseek_v3", "qwen3_moe")
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks that share the experts; copies of all the rest
CARRIERS = ("none", "torch", "mooncake")
CASES = [
    (ranks, copies, carrier) for ranks, copies in SHAPES for carrier in CARRIERS if copies == 1 or carrier != "none"
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    write_checkpoint(made, specs()[request.param].tiny())
    return made


def found(folder: Path, ranks: int, copies: int, carrier: str, **flags: object) -> list[list[object]]:
    """Of each copy. The first one is asked twice: then the others have nothing to do."""

    def work(planned: Planned, replica: int) -> list[object]:
        assert planned.computed_by.startswith("CPU kernels")
        told = answers(planned)
        assert replica or answers(planned) == told
        return told

    shape = {"tp_size": ranks, "dp_size": copies, "enable_dp_attention": copies > 1, "moe_a2a_backend": carrier}
    return on_every_replica(work, model_path=str(folder), dtype="bfloat16", **{**shape, **flags})


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[object]:
    return found(folder, 1, 1, "none")[0]


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(("ranks", "copies", "carrier"), CASES, ids=str)
def test_the_same_bits(folder: Path, expected: list[object], ranks: int, copies: int, carrier: str) -> None:
    assert found(folder, ranks, copies, carrier) == [expected] * copies


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(
    "flags",
    [
        {"enable_two_batch_overlap": True},
        {"moe_dense_tp_size": 1},
        {"ep_size": 2},
        {"enable_eplb": True, "ep_num_redundant_experts": 3, "eplb_rebalance_num_iterations": 4},
    ],
    ids=str,
)
def test_whatever_else_is_asked(folder: Path, expected: list[object], flags: dict[str, object]) -> None:
    assert found(folder, 4, 2, "mooncake", **flags) == [expected] * 2


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize("carrier", CARRIERS[1:])
def test_copies_that_share_nothing(folder: Path, expected: list[object], carrier: str) -> None:
    """Each has an exchange of its own, between its ranks, within this host."""
    assert found(folder, 2, 2, carrier, enable_dp_attention=False) == [expected] * 2
