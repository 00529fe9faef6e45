"""Prefill and decode on two servers answer as one server does, bit for bit, over every backend that moves pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from free_ports import free_port
from live_server import LiveServer
from pd_servers import Couple, PdRouter, couple, seconds_since
from processes import mapping
from tiny_folder import write_tiny_folder

from moonlang.base import clock

WIDE = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 128}  # 32 KB of keys and values per token
CHUNK = ("--chunked-prefill-size", "64")  # prompts of more than four pages come in pieces
STORY = "The old man and the sea. Once upon a time there was a fisherman who had caught nothing for many days. "
SOON_S = 30  # a tenth of the time that a request waits for a peer that is there
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module", params=["local", "mooncake"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Couple]:
    folder = tmp_path_factory.mktemp("pd")
    with couple(folder, request.param, "--enable-metrics", prefill=CHUNK) as both:
        yield both


@pytest.fixture(scope="module")
def router(pair: Couple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdRouter]:
    with PdRouter(tmp_path_factory.mktemp("router"), pair) as running:
        running.until(running.all_up)
        yield running


def answers(response: httpx.Response) -> list[dict[str, Any]]:
    """What must be equal of each answer."""
    assert response.status_code == 200, response.text
    body = response.json()
    kept = ("prompt_tokens", "completion_tokens", "finish_reason", "input_token_logprobs", "output_token_logprobs")
    more = ("input_top_logprobs", "output_top_logprobs")
    return [
        {"text": one["text"], "ids": one["output_ids"]}
        | {name: one["meta_info"][name] for name in (*kept, *more) if name in one["meta_info"]}
        for one in (body if isinstance(body, list) else [body])
    ]


def sampled(**params: Any) -> dict[str, Any]:
    return {"sampling_params": {"max_new_tokens": 24, **params}}


GREEDY = sampled(temperature=0)
CASES: dict[str, dict[str, Any]] = {
    "short": {"text": "Hi", **GREEDY},
    "one page": {"text": STORY[:30], **GREEDY},
    "many chunks": {"text": STORY * 12, **GREEDY},
    "seeded": {"text": STORY * 3, **sampled(temperature=1.0, sampling_seed=7, top_p=0.9, ignore_eos=True)},
    "several": {"text": STORY, **sampled(temperature=1.0, sampling_seed=11, n=4, ignore_eos=True)},
    "batch": {"text": [STORY, "Hi", STORY * 5, "The"], **GREEDY},
    "penalties": {"text": STORY * 2, **sampled(temperature=0, frequency_penalty=0.6, presence_penalty=0.3)},
    "one token": {"text": STORY, **sampled(temperature=0, max_new_tokens=1)},
    "grammar": {
        "text": "A person as JSON: ",
        **sampled(temperature=0, json_schema=json.dumps(SCHEMA), max_new_tokens=48),
    },
    "stop": {"text": "one two three one two three one two", **sampled(temperature=0, stop=["three", "4"])},
    "logprobs": {
        "text": STORY * 4,
        **GREEDY,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_as_one_server_does(server: LiveServer, router: PdRouter, name: str) -> None:
    """Twice: the second time with what both caches have kept."""
    body = CASES[name]
    straight = answers(server.http.post("/generate", json=body))
    assert answers(router.http.post("/generate", json=body)) == straight
    assert answers(router.http.post("/generate", json=body)) == straight


def test_many_at_once(server: LiveServer, router: PdRouter, pair: Couple) -> None:
    bodies = [
        {"text": f"{STORY * (i % 5)}Chapter {i}: ", **sampled(temperature=i % 2, sampling_seed=i, ignore_eos=True)}
        for i in range(24)
    ]
    with ThreadPoolExecutor(12) as pool:
        straight = list(pool.map(lambda body: answers(server.http.post("/generate", json=body)), bodies))
        paired = list(pool.map(lambda body: answers(router.http.post("/generate", json=body)), bodies))
    assert paired == straight
    pair.wait_free()


def test_streams(server: LiveServer, router: PdRouter) -> None:
    body = {"text": STORY * 2, **sampled(temperature=0, ignore_eos=True), "stream": True}
    straight, paired = (_last(one, body) for one in (server, router))
    assert paired["output_ids"] == straight["output_ids"]
    assert paired["text"] == straight["text"]


def _last(one: LiveServer | PdRouter, body: dict[str, Any]) -> dict[str, Any]:
    """The last piece, which holds the whole answer."""
    with one.http.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return json.loads(lines[-2])


def test_chat(server: LiveServer, router: PdRouter) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "What is 7 + 5?"}],
        "temperature": 0,
        "logprobs": True,
    }
    straight, paired = (one.http.post("/v1/chat/completions", json=body).json() for one in (server, router))
    assert paired["choices"] == straight["choices"]
    assert paired["usage"]["completion_tokens"] == straight["usage"]["completion_tokens"]


def test_prefill_answers_with_one_token(pair: Couple) -> None:
    first, second = pair.submit({"text": STORY, **GREEDY})
    prefill, decode = answers(first.result())[0], answers(second.result())[0]
    assert prefill["finish_reason"] == {"type": "length", "length": 1}
    assert prefill["ids"] == decode["ids"][:1]


def test_a_client_that_leaves_frees_everything(pair: Couple, router: PdRouter) -> None:
    body = {"text": STORY * 6, **sampled(max_new_tokens=4000, ignore_eos=True), "stream": True}
    with router.http.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    pair.wait_free()


def test_a_prefill_server_that_cannot_be_found_is_said_at_once(pair: Couple) -> None:
    port = free_port()
    body = {"text": "Hi", **GREEDY, "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 1 << 40}
    begin_ns = clock.monotonic_ns()
    answer = pair.decode.http.post("/generate", json=body)
    assert seconds_since(begin_ns) < SOON_S
    assert answer.status_code == 503
    assert f"127.0.0.1:{port}" in answer.text
    pair.decode.wait_free()


def test_metrics_tell_of_the_traffic(pair: Couple) -> None:
    assert pair.ask({"text": f"{STORY} once more", **GREEDY}).status_code == 200
    both = ("kv_transfer_bootstrap_ms_count", "kv_transfer_latency_ms_count", "kv_transfer_total_mb_sum")
    for one, more in ((pair.prefill, "kv_transfer_speed_gb_s_sum"), (pair.decode, "kv_transfer_alloc_ms_count")):
        lines = [line.rsplit(" ", 1) for line in one.http.get("/metrics").text.splitlines() if line[0] != "#"]
        found = {line[0].split("{")[0].split(":")[1]: float(line[1]) for line in lines if ":" in line[0]}
        assert all(found[name] > 0 for name in (*both, more, "kv_transfer_bytes_total")), found
        load = one.http.get("/v1/loads").json()["loads"][0]["disaggregation"]
        assert load["kv_transfer_latency_ms"] > 0


def test_the_receipt_tells_both_halves_apart(router: PdRouter) -> None:
    text = "A receipt is what one gets for money that one has spent. " * 4
    meta = router.http.post("/generate", json={"text": text, **GREEDY}).json()["meta_info"]
    stages = {stage["name"]: stage["seconds"] for stage in meta["receipt"]["stages"]}
    assert list(stages) == ["queue", "prefill", "transfer", "decode"]
    assert sum(stages.values()) == pytest.approx(meta["e2e_latency"])
    assert 0 < stages["prefill"] < meta["e2e_latency"]
    sources = meta["receipt"]["prompt_tokens_by_source"]
    assert sources["computed"] + meta["cached_tokens"] == meta["prompt_tokens"]
    assert sources["received"] >= sources["computed"]  # whole pages


def test_the_page_shows_both_halves(router: PdRouter) -> None:
    router.http.post("/generate", json={"text": "Hello", **GREEDY})
    shown = router.http.get("/ui/state").json()["instances"]
    assert [(one["kind"], one["up"], one["load"]["pairs"]["total_moved"] > 0) for one in shown] == [
        ("prefill", True, True),
        ("decode", True, True),
    ]
    trees = [router.http.get(f"/ui/tree?instance={one['id']}&nodes=5").json() for one in shown]
    assert all(tree["weight"][0] > 0 and len(tree["parent"]) <= 5 for tree in trees)


def test_no_process_of_either_half_has_zmq(pair: Couple) -> None:
    for half in (pair.prefill, pair.decode):
        assert mapping(half.process.pid, "memfd:moonlang") == ["api", "detokenizer", "scheduler"]
        assert mapping(half.process.pid, "zmq") == []


def test_a_room_is_needed(pair: Couple) -> None:
    answer = pair.prefill.http.post("/generate", json={"text": "Hi", **GREEDY})
    assert answer.status_code == 400
    assert "bootstrap room" in answer.text


def test_health_needs_no_peer(pair: Couple) -> None:
    for one in (pair.prefill, pair.decode):
        assert one.http.get("/health_generate").status_code == 200


def test_layers_leave_while_the_rest_is_computed(tmp_path: Path) -> None:
    """A model with so many keys and values that they are sent in groups of layers; decode alone is the reference."""
    write_tiny_folder(tmp_path / "model", **WIDE)
    model = ("--model-path", str(tmp_path / "model"), "--load-format", "dummy", "--enable-metrics")
    with couple(tmp_path, "local", *model, prefill=("--chunked-prefill-size", "512")) as both:
        body = {"input_ids": [(7 * i) % 200 for i in range(700)], **GREEDY, "return_logprob": True}
        first, second = both.submit(body)
        paired = answers(second.result())
        assert first.result().status_code == 200
        alone = {**body, "bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
        both.decode.http.post("/flush_cache", params={"timeout": 60}).raise_for_status()
        assert answers(both.decode.http.post("/generate", json=alone)) == paired
        pushes = both.prefill.load()["pairs"]["distributions"]["kv_transfer_latency_ms"]["counts"]
        assert sum(pushes) >= 2 * 4, "each of the two chunks in several groups"
        both.wait_free()
