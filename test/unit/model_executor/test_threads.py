"""How many threads compute, and where."""

import pytest

from moonlang.model_executor.threads import compute_threads, pin_kernel_threads


@pytest.mark.parametrize(
    ("cores", "offered", "environment", "threads"),
    [
        (1, 1, {}, 1),
        (2, 2, {}, 1),
        (8, 8, {}, 7),
        (16, 8, {}, 8),
        (8, 8, {"OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_threads(cores, offered, environment, threads):
    assert compute_threads(cores, offered, environment) == threads


@pytest.mark.parametrize(
    ("cores", "present", "environment", "pinned"),
    [
        (8, 8, {}, True),
        (4, 8, {}, False),
        (8, 8, {"MOONLANG_CPU_PIN": "0"}, False),
        (4, 8, {"MOONLANG_CPU_PIN": "1"}, True),
    ],
)
def test_threads_are_bound_where_the_machine_is_ours(cores, present, environment, pinned):
    assert pin_kernel_threads(cores, present, environment) is pinned
