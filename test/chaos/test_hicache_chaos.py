"""A store on a bad day: answers stay right, nobody waits for it, and it is used again when it is back."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mooncake_services
import pytest
from hicache_servers import PROMPT_TOKENS, Answer, CachedServer, prompt
from live_server import PACKAGE_FOLDER
from mooncake_services import Master, StoreService

from moonlang.base import clock

_log = logging.getLogger(__name__)

MOST = PROMPT_TOKENS - 16
BACK_S = 120  # a store that is back must be used again
SUPPORT = Path(__file__).parents[1] / "support"


class Mood:
    """The server, and the faults of its store."""

    def __init__(self, server: CachedServer, file: Path) -> None:
        self.server = server
        self._file = file

    def set(self, **mood: Any) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(mood))
        draft.rename(self._file)


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mood]:
    folder = tmp_path_factory.mktemp("moody")
    mood = folder / "mood.json"
    mood.write_text("{}")
    extra = {"module_path": "moody_store", "class_name": "MoodyStore", "directory": str(folder), "mood": str(mood)}
    environment = {"PYTHONPATH": f"{PACKAGE_FOLDER}{os.pathsep}{SUPPORT}"}
    with CachedServer(folder, backend="dynamic", extra=extra, environment=environment) as server:
        yield Mood(server, mood)


@pytest.fixture(scope="module")
def good(moody: Mood) -> list[Answer]:
    """What the prompts 0 to 5 are answered with; their pages are in the store."""
    answers = [moody.server.ask(prompt(seed)) for seed in range(6)]
    moody.server.settle()
    return answers


def until_used(server: CachedServer, seed: int, what: str) -> float:
    """Ask, flush and ask again until the store brings pages; seconds that it took."""
    begin_ns = clock.monotonic_ns()

    def is_used() -> bool:
        server.ask(prompt(seed))
        server.settle()
        server.flush()
        return server.ask(prompt(seed)).details["storage"] >= MOST

    server.until(is_used, BACK_S)
    seconds = (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S
    _log.info("%s: used again after %.1f s", what, seconds)
    return seconds


def minutes_since(begin_ns: int) -> int:
    """Minutes begun. The same complaint is logged once in each."""
    return 1 + (clock.monotonic_ns() - begin_ns) // (60 * clock.NS_PER_S)


DELAYS_S = (0.001, 0.1, 1.0, 10.0)
FAULTS: dict[str, dict[str, Any]] = {
    "checksum": {"flip": 1.0},
    "header": {"header": 1.0},
    "cut": {"cut": 1.0},
    "key": {"swap": 1.0},
    "replay": {"replay": 1.0},
    "drop": {"drop": 1.0},
    "error": {"fail": 1.0},
    "some of all": {"flip": 0.02, "header": 0.02, "cut": 0.02, "swap": 0.02, "replay": 0.02, "drop": 0.02},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_store_changes_an_answer(moody: Mood, good: list[Answer], fault: str) -> None:
    server = moody.server
    lines, begin_ns = server.log.count("KV store"), clock.monotonic_ns()
    moody.set(**FAULTS[fault])
    for _ in range(2):
        server.settle()
        server.flush()
        for seed, expected in enumerate(good):
            assert server.ask(prompt(seed)).same(expected)
    assert server.is_healthy()
    assert server.log.count("KV store") - lines <= 12 * minutes_since(begin_ns), "the log is flooded"
    moody.set()
    until_used(server, 0, fault)


@pytest.mark.parametrize("delay_s", DELAYS_S)
def test_a_slow_store_is_not_waited_for(moody: Mood, good: list[Answer], delay_s: float) -> None:
    server = moody.server
    moody.set(delay_s=delay_s)
    slowest = 0.0
    for seed in range(6):
        begin_ns = clock.monotonic_ns()
        assert server.ask(prompt(seed)).same(good[seed])
        assert server.ask(prompt(100 * (1 + DELAYS_S.index(delay_s)) + seed)).details["storage"] == 0
        slowest = max(slowest, (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S)
    _log.info("delay %g s: slowest pair of answers %.3f s", delay_s, slowest)
    assert slowest < max(DELAYS_S)
    assert server.is_healthy()
    moody.set()
    until_used(server, 0, f"{delay_s} s")


def test_a_full_store_says_so_once(moody: Mood, good: list[Answer]) -> None:
    server, begin_ns = moody.server, clock.monotonic_ns()
    moody.set(full=True)
    for seed in range(600, 606):
        server.ask(prompt(seed))
    server.settle()
    assert 1 <= server.log.count("There is no room") <= minutes_since(begin_ns)
    assert 'cause="full"' in server.http.get("/metrics").text
    moody.set()
    until_used(server, 610, "full")
    assert server.ask(prompt(0)).same(good[0])


def test_requests_go_on_while_a_store_takes_its_time_to_open(moody: Mood, good: list[Answer], tmp_path: Path) -> None:
    server, route = moody.server, "/hicache/storage-backend"
    assert server.http.delete(route).status_code == 200
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    extra = json.dumps({**server.extra, "gate": str(gate)})
    body = {"hicache_storage_backend": "dynamic", "hicache_storage_backend_extra_config_json": extra}
    with ThreadPoolExecutor(1) as client:
        attached = client.submit(server.http.put, route, json=body)
        with gate.open("wb"):  # the server waits at it now, and goes on when it is closed
            assert server.ask(prompt(0)).same(good[0])
            assert server.http.get(route).json()["hicache_storage_backend"] is None
            assert server.http.put(route, json=body).status_code == 400
            assert not attached.done()
        assert attached.result(90).status_code == 200
    assert server.http.get(route).json()["hicache_storage_backend"] == "dynamic"
    until_used(server, 620, "attached")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mooncake")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[Master]:
    with mooncake_services.master(folder, "--client_ttl=2") as running:
        yield running


@pytest.fixture(scope="module")
def service(folder: Path, master: Master) -> Iterator[StoreService]:
    with mooncake_services.store_service(folder, master.address, "64mb") as running:
        yield running


@pytest.fixture(scope="module")
def server(folder: Path, master: Master, service: StoreService) -> Iterator[CachedServer]:
    extra = {"master_server_address": master.address, "protocol": "tcp", "global_segment_size": 0}
    with CachedServer(folder, backend="mooncake", extra={**extra, "local_buffer_size": "1mb"}) as running:
        yield running


def ask_all(server: CachedServer, expected: dict[int, Answer]) -> float:
    """Everything, in pages that the device pool has forgotten as far as it can; the slowest answer in seconds."""
    slowest = 0.0
    for seed, answer in expected.items():
        begin_ns = clock.monotonic_ns()
        assert server.ask(prompt(seed)).same(answer)
        slowest = max(slowest, (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S)
    assert server.is_healthy()
    return slowest


def test_the_real_store_is_lost_and_comes_back(server: CachedServer, master: Master, service: StoreService) -> None:
    """Master paused, killed and restarted; store service paused, killed and restarted. The requests never notice."""
    begin_ns = clock.monotonic_ns()
    expected = {seed: server.ask(prompt(seed)) for seed in range(8)}  # more than the device pool holds
    until_used(server, 50, "first use")

    master.process.send_signal(signal.SIGSTOP)
    paused = ask_all(server, expected)
    master.process.send_signal(signal.SIGCONT)
    until_used(server, 51, "master paused")

    service.process.send_signal(signal.SIGSTOP)
    silent = ask_all(server, expected)
    service.process.send_signal(signal.SIGCONT)
    until_used(server, 52, "store service paused")

    service.kill()
    lost = ask_all(server, expected)
    service.start()
    until_used(server, 53, "store service killed")

    master.process.kill()
    master.process.wait()
    headless = ask_all(server, expected)
    successor = mooncake_services.start_master(
        master.port, master.metrics_port, server.log_path.with_name("master2.log"), "--client_ttl=2"
    )
    try:
        until_used(server, 54, "master killed")
    finally:
        successor.process.kill()
        successor.process.wait()
    slowest = [round(seconds, 2) for seconds in (paused, silent, lost, headless)]
    _log.info("slowest answers: master paused, service paused, service killed, master killed: %s s", slowest)
    assert max(slowest) < 20, "a request waits for a store that is away"
    assert server.log.count("KV store") <= 40 * minutes_since(begin_ns), "the log is flooded"
