"""Several copies of a model behind one address."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from pd_servers import couple
from processes import mapping
from prometheus_client.parser import text_string_to_metric_families

import moonlang

STORY = "The old man and the sea. Once upon a time there was a fisherman who had caught nothing for many days. "
FLAGS = ("--max-total-tokens", "20000", "--random-seed", "1", "--constrained-json-disable-any-whitespace")
ENDLESS = {"max_new_tokens": 4000, "ignore_eos": True}
BODIES = {
    "greedy": {"text": STORY * 3, "sampling_params": {"temperature": 0, "max_new_tokens": 24}, "return_logprob": True},
    "seeded": {"text": STORY, "sampling_params": {"sampling_seed": 7, "max_new_tokens": 24}},
    "grammar": {"text": "A number: ", "sampling_params": {"temperature": 0, "regex": "[0-9]{3}-[a-f]{2}"}},
}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    quick = {"SGLANG_HEALTH_CHECK_TIMEOUT": "3"}
    flags = (*FLAGS, "--enable-metrics", "--dp-size", "2")
    with LiveServer(tmp_path_factory.mktemp("replicas"), *flags, environment=quick) as running:
        yield running


def generate(server: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def told(answer: dict[str, Any]) -> tuple[Any, ...]:
    return answer["output_ids"], answer["meta_info"].get("output_token_logprobs"), answer["meta_info"]["finish_reason"]


def running(server: LiveServer) -> list[float]:
    return [load["num_running"] for load in server.loads()]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", BODIES)
def test_every_replica_answers_as_a_server_alone(
    server: LiveServer, replicas: LiveServer, name: str, rank: int
) -> None:
    found = generate(replicas, {**BODIES[name], "routed_dp_rank": rank})
    assert found["meta_info"]["dp_rank"] == rank
    assert told(found) == told(generate(server, BODIES[name]))


def test_every_process_talks_through_rings_alone(replicas: LiveServer) -> None:
    assert mapping(replicas.process.pid, "memfd:moonlang") == ["api", "detokenizer", "scheduler", "scheduler-1"]
    assert mapping(replicas.process.pid, "zmq") == []


def test_requests_are_spread(replicas: LiveServer) -> None:
    found = [generate(replicas, {**BODIES["greedy"], "stream": False})["meta_info"]["dp_rank"] for _ in range(6)]
    assert Counter(found) == {0: 3, 1: 3}
    body = {"text": ["a", "b", "c", "d"], "sampling_params": {"max_new_tokens": 2}}
    batch: Any = generate(replicas, body)
    assert Counter(one["meta_info"]["dp_rank"] for one in batch) == {0: 2, 1: 2}


def test_a_replica_that_does_not_exist_is_refused(replicas: LiveServer) -> None:
    answer = replicas.http.post("/generate", json={"text": "x", "data_parallel_rank": 2})
    assert (answer.status_code, "routed_dp_rank must be in [0, 1], got 2" in answer.text) == (400, True)


@pytest.mark.parametrize("how", [{"rid": "endless"}, {"abort_all": True}], ids=["one", "all"])
def test_aborts_reach_every_replica(replicas: LiveServer, how: dict[str, Any]) -> None:
    asked = [{"text": "x", "rid": f"endless-{n}", "sampling_params": ENDLESS} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(replicas.http.post, "/generate", json=body) for body in asked]
        replicas.until(lambda: running(replicas) == [2, 2])
        assert replicas.http.post("/abort_request", json=how).status_code == 200
        assert [one.result().json()["meta_info"]["finish_reason"]["type"] for one in answers] == ["abort"] * 4
    replicas.wait_idle()


def test_a_client_that_hangs_up_ends_its_request_where_it_runs(replicas: LiveServer) -> None:
    for rank in (0, 1):
        body = {"text": "x", "stream": True, "sampling_params": ENDLESS, "routed_dp_rank": rank}
        with replicas.http.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert running(replicas)[rank] == 1
        replicas.wait_idle()


def test_the_cache_of_every_replica_is_flushed(replicas: LiveServer) -> None:
    for rank in (0, 1):
        generate(replicas, {**BODIES["greedy"], "routed_dp_rank": rank})
    replicas.wait_idle()
    assert all(load["cached_tokens"] for load in replicas.loads())
    assert replicas.http.post("/flush_cache", params={"timeout": 60}).status_code == 200
    assert [load["cached_tokens"] for load in replicas.loads()] == [0, 0]


def test_what_is_said_of_replicas(replicas: LiveServer) -> None:
    found = replicas.http.get("/v1/loads").json()["loads"]
    assert [load["dp_rank"] for load in found] == [0, 1]
    assert [load["dp_rank"] for load in replicas.http.get("/v1/loads?dp_rank=1").json()["loads"]] == [1]
    assert replicas.http.get("/v1/loads?dp_rank=2").status_code == 400
    assert [load["dp_rank"] for load in replicas.http.get("/get_load").json()] == [0, 1]
    assert replicas.http.get("/server_info").json()["load_balance_method"] == "round_robin"
    families = {family.name: family for family in text_string_to_metric_families(replicas.http.get("/metrics").text)}
    for name in ("sglang:num_running_reqs", "sglang:token_usage", "sglang:realtime_tokens"):
        assert {sample.labels["dp_rank"] for sample in families[name].samples} == {"0", "1"}, name
    assert len({sample.labels["dp_rank"] for sample in families["sglang:queue_time_seconds"].samples}) == 2


def test_health_is_that_of_all_and_a_lost_replica_ends_the_server(replicas: LiveServer) -> None:
    second = replicas.roles()["scheduler-1"]
    replicas.until(lambda: replicas.http.get("/health").status_code == 200)
    os.kill(second, signal.SIGSTOP)
    assert replicas.http.get("/health").status_code == 503
    os.kill(second, signal.SIGCONT)
    replicas.until(lambda: replicas.http.get("/health").status_code == 200)
    os.kill(second, signal.SIGKILL)
    assert replicas.process.wait(60) == 1
    assert "The scheduler-1 was killed by SIGKILL" in replicas.log


def test_replicas_of_several_ranks_in_an_engine(server: LiveServer) -> None:
    with moonlang.Engine(dp_size=2, tp_size=2, max_total_tokens=4000, random_seed=1) as engine:
        assert len(engine.get_all_child_pids()) == 5
        for rank in (0, 1):
            found: Any = engine.generate(STORY * 3, {"temperature": 0, "max_new_tokens": 24}, routed_dp_rank=rank)
            assert found["meta_info"]["dp_rank"] == rank
            assert found["output_ids"] == generate(server, BODIES["greedy"])["output_ids"]


def test_pairs_of_replicas(server: LiveServer, tmp_path: Path) -> None:
    """The room says which prefill replica has a request; decode replicas take turns."""
    with couple(tmp_path, "local", "--dp-size", "2") as both:
        for _ in range(4):
            prefill, decode = (one.result() for one in both.submit(BODIES["greedy"]))
            assert (prefill.status_code, decode.status_code) == (200, 200), decode.text
            assert told(decode.json()) == told(generate(server, BODIES["greedy"]))
        for one in (both.prefill, both.decode):
            assert [load["pairs"]["total_moved"] for load in one.loads()] == [2, 2]  # type: ignore[index]
        assert both.prefill.http.get("/server_info").json()["load_balance_method"] == "follow_bootstrap_room"
        both.wait_free()
