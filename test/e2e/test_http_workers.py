"""Several processes that answer HTTP requests on one port, and several detokenizers behind them."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from live_server import LiveServer
from processes import mapping

FLAGS = ("--max-total-tokens", "20000", "--random-seed", "1", "--enable-metrics", "--messaging-backend", "mooncake")
FRONTS = 2
ENDLESS = {"max_new_tokens": 4000, "ignore_eos": True}
GREEDY = {"text": "The old man and the sea. ", "sampling_params": {"temperature": 0, "max_new_tokens": 24}}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    numbers = ("--tokenizer-worker-num", str(FRONTS), "--detokenizer-worker-num", "2")
    with LiveServer(tmp_path_factory.mktemp("workers"), *FLAGS, *numbers) as running:
        yield running


def fronts(server: LiveServer) -> list[psutil.Process]:
    """The processes that answer requests."""
    first = psutil.Process(server.process.pid)
    return [first, *(child for child in first.children() if "/api-" in " ".join(child.cmdline()))]


@contextmanager
def clients(server: LiveServer) -> Iterator[list[httpx.Client]]:
    """A client with a connection to each front."""
    processes = fronts(server)
    assert len(processes) == FRONTS
    found: dict[int, httpx.Client] = {}
    for _ in range(200):
        http = httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=1))
        port = http.get("/ready").extensions["network_stream"].get_extra_info("client_addr")[1]
        owner = next(
            number
            for number, process in enumerate(processes)
            if any(connection.raddr and connection.raddr.port == port for connection in process.net_connections("tcp"))
        )
        if owner in found:
            http.close()
        found.setdefault(owner, http)
        if len(found) == FRONTS:
            break
    try:
        yield [found[number] for number in range(FRONTS)]
    finally:
        for http in found.values():
            http.close()


def generate(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_every_front_answers_as_a_server_alone(server: LiveServer, workers: LiveServer) -> None:
    with clients(workers) as https:
        for http in https:
            assert generate(http, **GREEDY)["text"] == generate(server.http, **GREEDY)["text"]
            assert http.get("/server_info").json()["launch_command"].split()[-1] == "2"


def test_every_process_talks_through_rings_alone(workers: LiveServer) -> None:
    found = mapping(workers.process.pid, "memfd:moonlang")
    assert found == ["api", "api-1", "detokenizer", "detokenizer-1", "scheduler"]
    assert mapping(workers.process.pid, "zmq") == []


def test_two_fronts_may_have_a_request_of_the_same_name(server: LiveServer, workers: LiveServer) -> None:
    """Each client gets the answer to what it has asked, also while the other request runs."""
    bodies = [GREEDY | {"rid": "same"}, GREEDY | {"rid": "same", "text": "Once upon a time "}]
    with clients(workers) as https, ThreadPoolExecutor(FRONTS) as pool:
        for _ in range(4):
            answers = [pool.submit(generate, http, **body) for http, body in zip(https, bodies, strict=True)]
            for answer, body in zip(answers, bodies, strict=True):
                assert answer.result()["meta_info"]["id"] == "same"
                assert answer.result()["text"] == generate(server.http, **body)["text"]
        endless = {"text": "x", "rid": "same", "stream": True, "sampling_params": ENDLESS}
        with https[0].stream("POST", "/generate", json=endless) as first:
            next(first.iter_lines())
            assert generate(https[1], **bodies[1])["text"]
    workers.wait_idle()


def test_many_streams_with_stop_strings_through_all_fronts(workers: LiveServer) -> None:
    """Each text comes to the front that has asked, from whichever detokenizer."""

    def ask(http: httpx.Client, number: int) -> tuple[str, str]:
        text = f"Number {number} and "
        whole = generate(http, text=text, sampling_params={"temperature": 0, "max_new_tokens": 40})["text"]
        stop = whole[len(whole) // 2 :][:3]
        params = {"temperature": 0, "max_new_tokens": 40, "stop": stop}
        found = ""
        with http.stream("POST", "/generate", json={"text": text, "stream": True, "sampling_params": params}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line.removeprefix("data: "))["text"]
        return found, whole[: whole.index(stop)]

    with clients(workers) as https, ThreadPoolExecutor(FRONTS) as pool:
        jobs = [list(itertools.islice(itertools.count(n, FRONTS), 8)) for n in range(FRONTS)]
        for found in pool.map(lambda n: [ask(https[n], number) for number in jobs[n]], range(FRONTS)):
            assert [text for text, _ in found] == [wanted for _, wanted in found]
    workers.wait_idle()


@pytest.mark.parametrize("how", [{"rid": "mine"}, {"abort_all": True}], ids=["one", "all"])
def test_aborts_reach_the_requests_of_other_fronts(workers: LiveServer, how: dict[str, Any]) -> None:
    """Two fronts may have a request of the same name: they do not know of each other's."""
    with clients(workers) as https, ThreadPoolExecutor(FRONTS) as pool:
        body = {"text": "x", "rid": "mine", "sampling_params": ENDLESS}
        answers = [pool.submit(http.post, "/generate", json=body) for http in https]
        workers.until(lambda: workers.load()["num_running"] == FRONTS)
        assert workers.http.post("/abort_request", json=how).status_code == 200
        for answer in answers:
            meta = answer.result().json()["meta_info"]
            assert (meta["id"], meta["finish_reason"]["type"]) == ("mine", "abort")
    workers.wait_idle()


def test_a_client_that_hangs_up_ends_its_request_at_any_front(workers: LiveServer) -> None:
    with clients(workers) as https:
        for http in https:
            body = {"text": "x", "stream": True, "sampling_params": ENDLESS}
            with http.stream("POST", "/generate", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                assert workers.load()["num_running"] == 1
            workers.wait_idle()


def test_metrics_are_those_of_all_fronts(workers: LiveServer) -> None:
    def counted(http: httpx.Client) -> list[str]:
        names = (
            "sglang:num_requests_total{",
            "sglang:e2e_request_latency_seconds_count{",
            "sglang:http_requests_total{",
        )
        lines = http.get("/metrics").text.splitlines()
        return sorted(line for line in lines if line.startswith(names) and "/metrics" not in line)

    def requests(lines: list[str]) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:num_requests_total"))

    with clients(workers) as https:
        before = requests(counted(https[0]))
        for http in https:
            generate(http, **GREEDY)
        first, second = (counted(http) for http in https)
        assert first == second
        assert requests(first) == before + FRONTS
        assert "process_cpu_seconds_total" not in https[0].get("/metrics").text  # of which process?


def test_management_and_health_at_any_front(workers: LiveServer) -> None:
    with clients(workers) as https:
        for http in https:
            generate(http, **GREEDY)
            assert http.get("/health").status_code == 200
            assert http.post("/flush_cache", params={"timeout": 60}).status_code == 200
            assert workers.load()["cached_tokens"] == 0


def test_sigterm_lets_the_requests_of_all_fronts_finish(workers: LiveServer) -> None:
    processes = psutil.Process(workers.process.pid).children()
    begun = threading.Barrier(FRONTS + 1)

    def read(http: httpx.Client, tokens: int) -> list[str]:
        params = {"max_new_tokens": tokens, "ignore_eos": True}
        with http.stream("POST", "/generate", json={"text": "x", "stream": True, "sampling_params": params}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = next(lines)
            begun.wait(120)
            return [first, *lines]

    lengths = (100, 2000)  # the other front has more to do than the one that gets the signal
    with clients(workers) as https, ThreadPoolExecutor(FRONTS) as pool:
        streams = [pool.submit(read, http, tokens) for http, tokens in zip(https, lengths, strict=True)]
        begun.wait(120)
        assert workers.stop(signal.SIGTERM) == 0
        for stream, tokens in zip(streams, lengths, strict=True):
            *_, last, end = stream.result()
            assert end == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["meta_info"]["completion_tokens"] == tokens
    assert not psutil.wait_procs(processes, 60)[1]
