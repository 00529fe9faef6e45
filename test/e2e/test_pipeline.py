"""Servers whose layers are spread over the stages of a pipeline answer as one process does, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_server import LiveServer
from ranked_answers import BODIES, FLAGS, STORY, answers, sampled

STAGES = {"two": ("--pp-size", "2"), "two of two ranks": ("--pp-size", "2", "--tp-size", "2")}


@pytest.fixture(scope="module", params=STAGES.values(), ids=STAGES)
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("stages"), *FLAGS, *request.param) as running:
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_the_same_bits(server: LiveServer, stages: LiveServer, name: str) -> None:
    assert answers(stages, BODIES[name]) == answers(server, BODIES[name])


def test_many_at_once(server: LiveServer, stages: LiveServer) -> None:
    """More requests than stages, of different lengths, some of which go away."""
    bodies = [sampled(STORY[: 20 * i + 1], temperature=0, max_new_tokens=8 + 5 * (i % 4)) for i in range(10)]
    endless = {"text": "On", "sampling_params": {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}}
    with ThreadPoolExecutor(len(bodies)) as pool:
        with stages.http.stream("POST", "/generate", json=endless | {"stream": True}) as response:
            next(response.iter_lines())
            found = list(pool.map(lambda body: answers(stages, body), bodies))
        assert found == [answers(server, body) for body in bodies]
    stages.wait_idle()


def test_a_lost_stage_ends_the_server(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--pp-size", "2") as running:
        run = running.run_directory()
        os.kill(running.roles()["worker-1"], signal.SIGKILL)
        assert running.process.wait(60) != 0
        assert "worker-1 was killed by SIGKILL" in running.log
    assert not list(Path("/dev/shm").glob(f"{run.name}*"))


def test_an_orderly_end_is_quiet(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--pp-size", "2") as running:
        answers(running, BODIES["greedy"])
        running.process.terminate()
        assert running.process.wait(60) == 0
        assert "Traceback" not in running.log
