"""Routers in front of our servers: SGLang's own, the real one from PyPI, and ours; alone and in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port
from live_server import LiveProcess, LiveServer

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 3000, "ignore_eos": True}
OPENAI = {"model": "default", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
CHAT = [{"role": "user", "content": "What is 7 + 5?"}]
SERVER = ("--max-total-tokens", "20000")
PAIR = (*SERVER, "--disaggregation-transfer-backend", "local")


@dataclass(frozen=True, slots=True)
class Servers:
    """One that works alone, and a pair. port: where the prefill server can be found by the other."""

    alone: LiveServer
    prefill: LiveServer
    decode: LiveServer
    port: int


class Router(LiveProcess):
    """A router that is being tested."""

    def all_healthy(self) -> bool:
        return all(worker["is_healthy"] for worker in self.http.get("/workers").json()["workers"])

    def post(self, path: str, **body: Any) -> Any:
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            *lines, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert last == "[DONE]"
        return [json.loads(line) for line in lines]


class SglangRouter(Router):
    """`python -m sglang_router.launch_router` with these flags."""

    def __init__(self, folder: Path, *flags: str) -> None:
        ports = ("--host", "127.0.0.1", "--prometheus-port", str(free_port()))
        quick = ("--worker-startup-check-interval", "1", "--health-check-interval-secs", "1")
        super().__init__(folder, "sglang_router.launch_router", *ports, *quick, *flags, ready_path="/readiness")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder, port = tmp_path_factory.mktemp("servers"), free_port()
    with ExitStack() as stack:  # they start at the same time
        alone = LiveServer(folder, *SERVER)
        stack.callback(alone.close)
        at = ("--disaggregation-bootstrap-port", str(port))
        prefill = LiveServer(folder, "--disaggregation-mode", "prefill", *at, *PAIR)
        stack.callback(prefill.close)
        decode = LiveServer(folder, "--disaggregation-mode", "decode", *PAIR)
        stack.callback(decode.close)
        for server in (alone, prefill, decode):
            server.wait_until_up()
        yield Servers(alone, prefill, decode, port)


@pytest.fixture(scope="module")
def sglang_alone(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with SglangRouter(tmp_path_factory.mktemp("router"), "--worker-urls", servers.alone.url) as running:
        yield running


@pytest.fixture(scope="module")
def sglang_pairs(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    prefill = ("--prefill", servers.prefill.url, str(servers.port))
    flags = ("--pd-disaggregation", *prefill, "--decode", servers.decode.url)
    with SglangRouter(tmp_path_factory.mktemp("router"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def our_pairs(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    flags = ("--host", "127.0.0.1", "--prefill", servers.prefill.url, "--decode", servers.decode.url)
    with Router(tmp_path_factory.mktemp("router"), "sglang.srt.disaggregation.mini_lb", *flags) as running:
        yield running


@pytest.fixture(params=["sglang_alone", "sglang_pairs", "our_pairs"])
def router(request: pytest.FixtureRequest) -> Router:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ids(servers: Servers) -> list[int]:
    return servers.alone.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]


def straight(servers: Servers, path: str, **body: Any) -> Any:
    """What the server that works alone answers by itself."""
    return servers.alone.http.post(path, json=body).json()


def test_the_other_router_takes_servers_for_what_they_are(
    sglang_alone: Router, sglang_pairs: Router, servers: Servers
) -> None:
    sglang_alone.until(sglang_alone.all_healthy)
    sglang_pairs.until(sglang_pairs.all_healthy)
    (alone,) = sglang_alone.http.get("/workers").json()["workers"]
    assert (alone["url"], alone["worker_type"], alone["is_healthy"]) == (servers.alone.url, "regular", True)
    assert alone["metadata"]["disaggregation_mode"] == "null"
    pair = {worker["worker_type"]: worker for worker in sglang_pairs.http.get("/workers").json()["workers"]}
    assert {kind: worker["metadata"]["disaggregation_mode"] for kind, worker in pair.items()} == {
        "prefill": "prefill",
        "decode": "decode",
    }
    assert pair["prefill"]["bootstrap_port"] == servers.port
    for router in (sglang_alone, sglang_pairs):
        assert all(one["load"] == 0 for one in router.http.get("/get_loads").json()["workers"])
        assert router.http.post("/flush_cache").json()["status"] == "success"


def test_models(router: Router, servers: Servers) -> None:
    (model,) = router.http.get("/v1/models").json()["data"]
    assert model["id"] == servers.alone.http.get("/v1/models").json()["data"][0]["id"]


def test_native_calls(router: Router, servers: Servers, ids: list[int]) -> None:
    expected = straight(servers, "/generate", text=PROMPT, sampling_params=GREEDY)
    for prompt in ({"text": PROMPT}, {"input_ids": ids}):
        assert router.post("/generate", **prompt, sampling_params=GREEDY)["output_ids"] == expected["output_ids"]
        assert router.events("/generate", **prompt, sampling_params=GREEDY)[-1]["text"] == expected["text"]
    first, second = router.post("/generate", input_ids=[ids, ids[:2]], sampling_params=GREEDY)
    assert first["output_ids"] == expected["output_ids"]
    assert second["meta_info"]["prompt_tokens"] == 2
    seeded = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True, "sampling_seed": 7, "n": 3}
    samples = router.post("/generate", input_ids=ids, sampling_params=seeded)
    expected = straight(servers, "/generate", input_ids=ids, sampling_params=seeded)
    assert [answer["output_ids"] for answer in samples] == [answer["output_ids"] for answer in expected]


def test_log_probabilities(router: Router, servers: Servers, ids: list[int]) -> None:
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    body = {"input_ids": ids, "sampling_params": GREEDY, **wanted}
    expected = straight(servers, "/generate", **body)["meta_info"]
    found = router.post("/generate", **body)["meta_info"]
    for name in ("input_token_logprobs", "output_token_logprobs"):  # the other router writes numbers anew
        for (value, token, _), (wanted_value, wanted_token, _) in zip(found[name], expected[name], strict=True):
            assert token == wanted_token
            assert value == (wanted_value and pytest.approx(wanted_value, rel=1e-12))
    assert len(found["output_top_logprobs"]) == 16


def test_our_router_merges_all_log_probabilities(our_pairs: Router, servers: Servers, ids: list[int]) -> None:
    body = {"input_ids": [ids, ids[:2]], "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0}
    expected = straight(servers, "/generate", **body, top_logprobs_num=1)
    names = [name for name in expected[0]["meta_info"] if "logprobs" in name]
    last = {event["index"]: event for event in our_pairs.events("/generate", **body, top_logprobs_num=1)}
    for index, found in enumerate(our_pairs.post("/generate", **body, top_logprobs_num=1)):
        for name in names:
            assert found["meta_info"][name] == last[index]["meta_info"][name] == expected[index]["meta_info"][name]
    echo = {"prompt": [PROMPT, "The"], "echo": True, "logprobs": 2, **OPENAI}
    expected = straight(servers, "/v1/completions", **echo)["choices"]
    assert our_pairs.post("/v1/completions", **echo)["choices"] == expected
    tokens: list[list[Any]] = [[], []]
    for chunk in our_pairs.events("/v1/completions", **echo):
        for choice in chunk["choices"]:
            lists = choice["logprobs"]
            tokens[choice["index"]] += zip(lists["tokens"], lists["text_offset"], lists["token_logprobs"], strict=True)
    for choice, found in zip(expected, tokens, strict=True):
        lists = choice["logprobs"]
        assert found == list(zip(lists["tokens"], lists["text_offset"], lists["token_logprobs"], strict=True))


def test_openai_calls(router: Router, servers: Servers) -> None:
    expected = straight(servers, "/v1/completions", prompt=[PROMPT, "The"], **OPENAI)["choices"]
    found = router.post("/v1/completions", prompt=[PROMPT, "The"], **OPENAI)["choices"]
    assert [choice["text"] for choice in found] == [choice["text"] for choice in expected]
    samples = {"prompt": [PROMPT, "The", "A"], "n": 2, **OPENAI}
    found = router.post("/v1/completions", **samples)["choices"]
    assert [choice["text"] for choice in found] == [
        choice["text"] for choice in straight(servers, "/v1/completions", **samples)["choices"]
    ]
    chunks = router.events("/v1/completions", prompt=PROMPT, **OPENAI)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected[0]["text"]
    expected = straight(servers, "/v1/chat/completions", messages=CHAT, n=2, **OPENAI)["choices"]
    found = router.post("/v1/chat/completions", messages=CHAT, n=2, **OPENAI)["choices"]
    assert [choice["message"] for choice in found] == [choice["message"] for choice in expected]
    chunks = router.events("/v1/chat/completions", messages=CHAT, **OPENAI)
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == expected[0]["message"]["content"]


def test_a_client_that_leaves_frees_the_servers(router: Router, servers: Servers) -> None:
    body = {"text": "a", "sampling_params": LONG, "stream": True}
    with router.http.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    for server in (servers.alone, servers.prefill, servers.decode):
        server.wait_idle()


def test_refusals_reach_the_client(router: Router) -> None:
    response = router.http.post("/generate", json={"text": "a", "sampling_params": {"temperature": -1}})
    assert response.status_code == 400
    assert "temperature" in response.text
