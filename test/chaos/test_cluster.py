"""Clusters whose parent is killed, again and again: nothing is left, and the next one finds every port it wants.

MOONLANG_SOAK_CYCLES=50 makes as many cycles as the product promises to survive.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
from live_cluster import LiveCluster

from moonlang.base import clock
from moonlang.mooncake import lib

CYCLES = int(os.environ.get("MOONLANG_SOAK_CYCLES", "3"))
PAIR = ("--prefill", "1", "--decode", "1", "--store", "64mb", "--max-total-tokens", "20000")

pytestmark = pytest.mark.skipif(bool(lib.how_to_get()), reason=lib.how_to_get() or "-")


@pytest.mark.parametrize("cycle", range(CYCLES))
def test_a_killed_parent_leaves_nothing(cycle: int) -> None:
    """Every third one is killed at work, the others at some moment of their start."""
    with LiveCluster(*PAIR, name="soak") as cluster:
        if cycle % 3:
            clock.sleep_s(random.Random(cycle).uniform(0.1, 4.0))
        else:
            cluster.wait_ready()
            assert cluster.ask().status_code == 200
            assert len(cluster.members()) >= 8
        trouble = cluster.port_trouble()
        cluster.kill()
        cluster.command("status")  # any command removes the folder of one that was killed before it had a child
        assert cluster.left_behind() == []
        assert trouble == []


def test_a_server_that_cannot_start_ends_it_with_its_last_words(tmp_path: Path) -> None:
    with LiveCluster("--replicas", "1", "--model-path", str(tmp_path), name="storm") as cluster:
        assert cluster.process.wait(120) == 2
        assert re.search(r"server-0 \(regular\) does not stay up.*has no config.json", cluster.said, re.DOTALL)
        assert cluster.left_behind() == []
