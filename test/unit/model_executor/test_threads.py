"""One core stays free for the rest of the server."""

import pytest

from moonlang.model_executor.threads import compute_threads


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
