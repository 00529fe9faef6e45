"""How many pages, out of which memory, and the reason that goes into the log."""

import pytest
import torch

from moonlang.base.errors import ConfigError
from moonlang.core.kv import KvSchema
from moonlang.model_executor.sizing import pool_pages

CPU = torch.device("cpu")
MIB = 1 << 20
SCHEMA = KvSchema(num_layers=2, num_kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16", itemsize=2)  # 16 KiB


def pages(**changes):
    settings = {
        "free": 1000 * MIB,
        "weights": 100 * MIB,
        "device": CPU,
        "mem_fraction": None,
        "max_total_tokens": None,
        "max_running": 10_000,
        "context_length": 100_000,
    }
    return pool_pages(SCHEMA, **settings | changes)


def test_a_share_of_free_memory_less_the_weights():
    assert pages()[0] == (500 - 100) * MIB // SCHEMA.page_bytes
    count, reason = pages(mem_fraction=0.75)
    assert count == (750 - 100) * MIB // SCHEMA.page_bytes
    assert reason.startswith("0.75 of")


def test_no_more_than_the_running_requests_can_use():
    count, reason = pages(max_running=4, context_length=1000)
    assert count == 4 * 63
    assert "4 sequences of 1000 tokens" in reason


def test_max_total_tokens_is_a_ceiling():
    assert pages(max_total_tokens=1600) == (100, "--max-total-tokens")
    assert pages(max_total_tokens=10**12)[1] != "--max-total-tokens"


@pytest.mark.parametrize("changes", [{"max_total_tokens": 15}, {"weights": 900 * MIB}, {"mem_fraction": 0.05}])
def test_less_than_a_page_is_an_error_with_a_way_out(changes):
    with pytest.raises(ConfigError, match="--mem-fraction-static"):
        pages(**changes)
