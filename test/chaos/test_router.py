"""A router in front of two prefill and two decode servers, some of which have a bad day.

Every client gets its answer, or an error that says that it may try again; nothing hangs, and no page is lost.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_ports import free_port
from live_server import LiveProcess
from pd_servers import PdServer, seconds_since

from moonlang.base import clock

BACKEND = "mooncake"
REQUESTS_VARIABLE = "MOONLANG_SOAK_REQUESTS"
REQUESTS = 300
CONCURRENCY = 32
ABORTED = 0.05  # share of requests whose client leaves
STORY = "The old man and the sea. Once upon a time there was a fisherman. "


class Router(LiveProcess):
    """A router in front of servers by role."""

    def __init__(self, folder: Path, prefill: list[PdServer], decode: list[PdServer]) -> None:
        flags = [word for server in prefill for word in ("--prefill", server.url)]
        flags += [word for server in decode for word in ("--decode", server.url)]
        health = ("--health-check-interval-secs", "0.3", "--health-check-timeout-secs", "2")
        lots = ("--policy", "round_robin", "--decode-policy", "round_robin", "--retry-max-retries", "12")
        super().__init__(folder, "moonlang.router", "--host", "127.0.0.1", *health, *lots, *flags)

    def up(self) -> int:
        return sum(worker["is_healthy"] for worker in self.http.get("/workers").json()["workers"])

    def load(self, server: PdServer) -> int:
        """Requests that this server has of this router."""
        return self.http.get(f"/workers/{server.url}").json()["load"]


class Cluster:
    """The servers, and what they answer on a good day."""

    def __init__(self, folder: Path, prefill: list[PdServer], decode: list[PdServer]) -> None:
        self.folder = folder
        self.prefill = prefill
        self.decode = decode
        self.expected: dict[int, list[int]] = {}
        self.pool = ThreadPoolExecutor(CONCURRENCY)
        self.http = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=128))

    @property
    def servers(self) -> list[PdServer]:
        return [*self.prefill, *self.decode]

    def submit(self, router: Router, numbers: range) -> list[Future[httpx.Response]]:
        return [self.pool.submit(self.http.post, f"{router.url}/generate", json=body(number)) for number in numbers]

    def at_work(self, router: Router, victim: PdServer) -> list[tuple[int, Future[httpx.Response]]]:
        """Requests with their numbers, as many as it takes until one has been seen at this server."""
        asked: list[tuple[int, Future[httpx.Response]]] = []

        def is_seen() -> bool:
            if all(one.done() for _, one in asked):
                asked.extend(enumerate(self.submit(router, range(32))))
            return router.load(victim) > 0

        router.until(is_seen)
        return asked

    def check(self, number: int, answer: httpx.Response) -> None:
        """This answer is right."""
        assert answer.status_code == 200, answer.text
        found = answer.json()["output_ids"]
        assert self.expected.setdefault(number, found) == found

    def wait_free(self) -> None:
        for server in self.servers:
            server.wait_free()


def body(number: int, tokens: int = 24) -> dict[str, Any]:
    """One request of many: prompts of different lengths, some with a beginning in common."""
    text = f"{STORY * (number % 4)}Chapter {number % 40}: "
    sampling = {"temperature": number % 2, "sampling_seed": number, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        servers = [PdServer(folder, role, free_port(), BACKEND) for role in ("prefill", "prefill", "decode", "decode")]
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.wait_until_up()
        found = Cluster(folder, servers[:2], servers[2:])
        stack.callback(found.http.close)
        stack.callback(found.pool.shutdown)
        yield found


@pytest.fixture
def router(cluster: Cluster, tmp_path: Path) -> Iterator[Router]:
    with Router(tmp_path, cluster.prefill, cluster.decode) as running:
        running.until(lambda: running.up() == 4)
        yield running


def test_a_soak(cluster: Cluster, router: Router) -> None:
    """Many requests, streamed and not, some of whose clients leave."""
    draw = random.Random(1)
    kinds = [draw.random() for _ in range(int(os.environ.get(REQUESTS_VARIABLE, REQUESTS)))]

    def one(number: int) -> str:
        if kinds[number] >= 2 * ABORTED + 0.3:
            cluster.check(number, cluster.http.post(f"{router.url}/generate", json=body(number)))
            return "whole"
        leaves = kinds[number] < ABORTED
        asked = {**body(number, 200 if leaves else 24), "stream": True}
        with cluster.http.stream("POST", f"{router.url}/generate", json=asked) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            if leaves:
                for _ in itertools.islice(lines, number % 5):
                    pass
                return "left"
            *_, last, done = lines
        assert done == "data: [DONE]"
        assert len(json.loads(last.removeprefix("data: "))["output_ids"]) == 24
        return "streamed"

    count = Counter(cluster.pool.map(one, range(len(kinds))))
    assert min(count.values()) >= len(kinds) * ABORTED / 3, count
    cluster.wait_free()
    router.until(lambda: router.up() == 4)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_server_that_stops_for_a_while(cluster: Cluster, router: Router, role: str) -> None:
    victim = (cluster.prefill if role == "prefill" else cluster.decode)[0]
    asked = cluster.at_work(router, victim)
    pids = [victim.process.pid, victim.scheduler]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for number, answer in asked:
        cluster.check(number, answer.result(150))
    router.until(lambda: router.up() == 3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    router.until(lambda: router.up() == 4)
    cluster.wait_free()
    for number, answer in enumerate(cluster.submit(router, range(8))):
        cluster.check(number, answer.result(150))


def test_a_router_that_is_killed_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    with Router(tmp_path, cluster.prefill, cluster.decode) as first:
        first.until(lambda: first.up() == 4)
        asked = [cluster.pool.submit(cluster.http.post, f"{first.url}/generate", json=body(n, 2000)) for n in range(16)]
        first.until(lambda: first.load(cluster.decode[0]) > 0)
        first.process.kill()
        for answer in asked:
            with pytest.raises(httpx.TransportError):
                answer.result(150)
        cluster.wait_free()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_server_that_is_killed(cluster: Cluster, router: Router, role: str) -> None:
    """Its requests are answered by others, and its successor behind the same address works."""
    group = cluster.prefill if role == "prefill" else cluster.decode
    victim = group[1]
    asked = cluster.at_work(router, victim)
    victim.process.kill()
    for number, answer in asked:
        cluster.check(number, answer.result(150))
    router.until(lambda: router.up() == 3)
    victim.start_again()
    router.until(lambda: router.up() == 4)
    for number, answer in enumerate(cluster.submit(router, range(8))):
        cluster.check(number, answer.result(150))
    cluster.wait_free()


def test_a_stream_whose_server_is_killed_says_so(cluster: Cluster, router: Router) -> None:
    """Last in this file: the server is not there any more after it."""
    asked = {**body(1, 3000), "stream": True}
    with cluster.http.stream("POST", f"{router.url}/generate", json=asked) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        victim = next(server for server in cluster.decode if router.load(server))
        begin_ns = clock.monotonic_ns()
        victim.process.kill()
        *_, error, done = lines
        assert seconds_since(begin_ns) < 30  # not the time limit of the request
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["retryable"] is True
    cluster.decode.remove(victim)
    cluster.check(1, cluster.http.post(f"{router.url}/generate", json=body(1)))
    cluster.wait_free()
