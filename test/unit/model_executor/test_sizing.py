"""How many pages, out of which memory, and the reason that goes into the log."""

import pytest
import torch

from moonlang.base.errors import ConfigError
from moonlang.core.kv import KvSchema
from moonlang.model_executor.sizing import free_bytes, pool_pages

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


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_free_memory_is_the_least_of_host_and_control_group(tmp_path):
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"})
    assert free_bytes(CPU, tmp_path) == 4000 * 1024
    write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1000\n"})
    assert free_bytes(CPU, tmp_path) == 4000 * 1024
    write(tmp_path, {"sys/fs/cgroup/memory.max": "500000\n"})
    assert free_bytes(CPU, tmp_path) == 499_000
    version_1 = "sys/fs/cgroup/memory/memory."
    write(tmp_path, {f"{version_1}limit_in_bytes": "3000", f"{version_1}usage_in_bytes": "5000"})
    assert free_bytes(CPU, tmp_path) == 0
