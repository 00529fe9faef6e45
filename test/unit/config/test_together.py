"""The table of what goes together says what the arguments are checked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.config.resolve import HostFacts, resolve_args
from moonlang.config.server_args import ServerArgs

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "several-ranks.md"
MIXTURE = ModelConfig(
    path="/m", hf={"num_local_experts": 8}, architectures=("M",), model_type="m", vocab_size=100, hidden_size=64,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, context_length=2048, dtype="bfloat16",
    eos_token_ids=(2,), generation={},
)  # fmt: skip
CPU = HostFacts(cpu_kernels="avx512")
FLAGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "--tp-size": {"tp_size": 2},
        "--pp-size": {"pp_size": 2},
        "--dp-size": {"dp_size": 2},
        "--enable-dp-attention": {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
        "--moe-a2a-backend": {"tp_size": 2, "moe_a2a_backend": "mooncake"},
        "--enable-eplb": {"tp_size": 2, "moe_a2a_backend": "torch", "enable_eplb": True, "ep_num_redundant_experts": 2},
        "--elastic-ep-backend": {"tp_size": 2, "elastic_ep_backend": "mooncake"},
        "--disaggregation-mode": {"disaggregation_mode": "prefill"},
        "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
        "--nnodes": {"tp_size": 2, "nnodes": 2, "dist_init_addr": "10.0.0.1:5000"},
        "--in-process": {"in_process": True},
    }
)


def _table() -> dict[tuple[str, str], str]:
    """(row, column) -> cell."""
    lines = PAGE.read_text().partition("## What goes together\n")[2].splitlines()
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    names = [row[0] for row in rows]
    assert names == list(FLAGS)
    return {(row[0], name): cell for row in rows for name, cell in zip(names, row[1:], strict=True)}


TABLE = _table()


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FLAGS, 2)))
def test_the_table_is_true(one: str, other: str) -> None:
    assert TABLE[one, other] == TABLE[other, one]
    given = {**FLAGS[one], **FLAGS[other]}
    if TABLE[one, other] == "yes":
        resolve_args(ServerArgs.create(**given), MIXTURE, CPU)
        return
    assert TABLE[one, other] == "no"
    with pytest.raises(ConfigError) as refused:
        resolve_args(ServerArgs.create(**given), MIXTURE, CPU)
    assert refused.value.hint


def test_three_go_together_when_each_two_do() -> None:
    for names in itertools.combinations(FLAGS, 3):
        if all(TABLE[pair] == "yes" for pair in itertools.combinations(names, 2)):
            given = {flag: value for name in names for flag, value in FLAGS[name].items()}
            resolve_args(ServerArgs.create(**given), MIXTURE, CPU)
