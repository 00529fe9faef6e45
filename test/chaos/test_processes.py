"""Real servers whose processes are killed or stopped: it is said at once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_folder import write_tiny_folder
from watched_server import Watched, WatchedServer, watched_server

from moonlang.base.clock import NS_PER_S, monotonic_ns

REPORT_NS = 30 * NS_PER_S  # a dead role is reported within this: at once, not by --watchdog-timeout
GONE_S = 60.0


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = write_tiny_folder(tmp_path_factory.mktemp("model"))
    return ("--model-path", str(folder), "--load-format", "dummy", "--max-total-tokens", "20000")


@pytest.fixture
def server(flags: tuple[str, ...]) -> Iterator[WatchedServer]:
    with watched_server(*flags) as server:
        server.wait_ready()
        yield server


def assert_nothing_left(server: WatchedServer, children: Watched) -> None:
    children.wait_gone(GONE_S)
    assert server.left_behind() == []


@pytest.mark.parametrize("role", ["scheduler", "detokenizer"])
def test_a_killed_role_ends_the_server_and_its_requests(server: WatchedServer, role: str) -> None:
    pids = server.roles()
    assert sorted(pids) == ["detokenizer", "scheduler"]
    children = Watched(pids)
    endless = {"text": "x", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/generate", endless)
        server.wait_line("#new-token: 1,")  # it runs
        before = monotonic_ns()
        os.kill(pids[role], signal.SIGKILL)
        server.wait_line(f"The {role} was killed by SIGKILL")
        assert monotonic_ns() - before < REPORT_NS
        status, body = answer.result(GONE_S)
    assert status == 503, body
    assert role in str(body)
    assert server.wait_exit() == 1
    assert_nothing_left(server, children)


def test_a_killed_http_worker_ends_the_server(flags: tuple[str, ...]) -> None:
    """Its clients are gone with it, and so are the requests that nobody else knows."""
    with watched_server(*flags, "--tokenizer-worker-num", "2") as server:
        server.wait_ready()
        pids = server.roles()
        assert sorted(pids) == ["api-1", "detokenizer", "scheduler"]
        children = Watched(pids)
        os.kill(pids["api-1"], signal.SIGKILL)
        server.wait_line("The api-1 was killed by SIGKILL")
        assert server.wait_exit() == 1
        assert_nothing_left(server, children)


def test_a_killed_server_takes_its_roles_along(server: WatchedServer) -> None:
    children = Watched(server.roles())
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.wait_exit() == -signal.SIGKILL
    assert_nothing_left(server, children)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_server_in_order(server: WatchedServer, number: signal.Signals) -> None:
    children = Watched(server.roles())
    os.kill(server.process.pid, number)
    assert server.wait_exit() == 0
    assert_nothing_left(server, children)
    assert not [line for line in server.lines if "Traceback" in line or "rror" in line]


def test_threads_end_in_order_too(flags: tuple[str, ...]) -> None:
    with watched_server(*flags, "--in-process") as server:
        server.wait_ready()
        assert server.roles() == {}
        assert server.post("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2}})[0] == 200
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait_exit() == 0
        assert server.left_behind() == []


def test_a_scheduler_that_hangs_ends_the_server(flags: tuple[str, ...]) -> None:
    with watched_server(*flags, "--watchdog-timeout", "4") as server:
        server.wait_ready()
        pids = server.roles()
        children = Watched(pids)
        os.kill(pids["scheduler"], signal.SIGSTOP)
        server.wait_line("The scheduler has not answered for 4 s")
        assert server.wait_exit() == 1
        assert_nothing_left(server, children)


def roles_of(server: WatchedServer) -> dict[str, int]:
    """Its roles as soon as both have been started."""
    deadline_ns = monotonic_ns() + 90 * NS_PER_S
    while len(pids := server.roles()) < 2:
        assert monotonic_ns() < deadline_ns
        threading.Event().wait(0.005)
    return pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_end_during_the_start_leaves_no_orphans(flags: tuple[str, ...], number: signal.Signals) -> None:
    with watched_server(*flags) as server:
        children = Watched(roles_of(server))
        os.kill(server.process.pid, number)
        server.wait_exit()
        children.wait_gone(GONE_S)
        if number is not signal.SIGKILL:  # then the next server that starts removes the folder
            assert server.left_behind() == []


def test_a_model_that_cannot_be_loaded_is_said_in_one_line_with_status_2(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with watched_server("--model-path", str(folder)) as server:
        assert server.wait_exit(120) == 2
        assert not [line for line in server.lines if "Traceback" in line], server.lines
        assert [line for line in server.lines if line.startswith("Error:")]
        assert server.left_behind() == []
