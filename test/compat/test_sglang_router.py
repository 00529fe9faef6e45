"""SGLang's own router, the real one from PyPI, in front of our servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveProcess, LiveServer, free_port

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 3000, "ignore_eos": True}


class SglangRouter(LiveProcess):
    """`python -m sglang_router.launch_router` with these flags."""

    def __init__(self, folder: Path, *flags: str) -> None:
        ports = ("--host", "127.0.0.1", "--prometheus-port", str(free_port()))
        quick = ("--worker-startup-check-interval", "1", "--health-check-interval-secs", "1")
        super().__init__(folder, "sglang_router.launch_router", *ports, *quick, *flags, ready_path="/readiness")

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("server"), "--max-total-tokens", "20000") as running:
        yield running


@pytest.fixture(scope="module")
def router(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangRouter]:
    with SglangRouter(tmp_path_factory.mktemp("router"), "--worker-urls", server.url) as running:
        yield running


@pytest.fixture(scope="module")
def ids(server: LiveServer) -> list[int]:
    return server.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]


@pytest.fixture(scope="module")
def straight(server: LiveServer) -> Any:
    """What the server itself answers."""
    return server.http.post("/generate", json={"text": PROMPT, "sampling_params": GREEDY}).json()


def test_it_takes_the_server_for_what_it_is(router: SglangRouter, server: LiveServer) -> None:
    (worker,) = router.http.get("/workers").json()["workers"]
    assert (worker["url"], worker["worker_type"], worker["is_healthy"]) == (server.url, "regular", True)
    assert worker["metadata"]["disaggregation_mode"] == "null"
    assert worker["metadata"]["tp_size"] == "1"
    (model,) = router.http.get("/v1/models").json()["data"]
    assert model["id"] == server.http.get("/v1/models").json()["data"][0]["id"]
    assert router.http.get("/get_loads").json()["workers"] == [{"worker": server.url, "load": 0}]
    assert router.http.post("/flush_cache").json()["status"] == "success"


def test_native_calls(router: SglangRouter, ids: list[int], straight: Any) -> None:
    for prompt in ({"text": PROMPT}, {"input_ids": ids}):
        assert router.post("/generate", **prompt, sampling_params=GREEDY)["output_ids"] == straight["output_ids"]
        assert router.events("/generate", **prompt, sampling_params=GREEDY)[-1]["text"] == straight["text"]
    first, second = router.post("/generate", input_ids=[ids, ids[:2]], sampling_params=GREEDY)
    assert first["output_ids"] == straight["output_ids"]
    assert second["meta_info"]["prompt_tokens"] == 2
    samples = router.post("/generate", input_ids=ids, sampling_params={**GREEDY, "n": 2})
    assert [answer["output_ids"] for answer in samples] == [straight["output_ids"]] * 2
    found = router.post(
        "/generate", input_ids=ids, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
    )
    assert len(found["meta_info"]["input_token_logprobs"]) == len(ids)
    assert len(found["meta_info"]["output_top_logprobs"]) == 16


def test_openai_calls(router: SglangRouter, straight: Any) -> None:
    greedy = {"model": "default", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    whole = router.post("/v1/completions", prompt=PROMPT, **greedy)
    assert whole["choices"][0]["text"] == straight["text"]
    both = router.post("/v1/completions", prompt=[PROMPT, "The"], **greedy)
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    chunks = router.events("/v1/completions", prompt=PROMPT, **greedy)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == straight["text"]
    messages = [{"role": "user", "content": "What is 7 + 5?"}]
    chat = router.post("/v1/chat/completions", messages=messages, n=2, **greedy)
    assert len(chat["choices"]) == 2
    chunks = router.events("/v1/chat/completions", messages=messages, **greedy)
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == chat["choices"][0]["message"]["content"]


def test_a_client_that_leaves_frees_the_server(router: SglangRouter, server: LiveServer) -> None:
    with router.http.stream(
        "POST", "/generate", json={"text": "a", "sampling_params": LONG, "stream": True}
    ) as response:
        next(response.iter_lines())
    server.wait_idle(10)


def test_refusals_reach_the_client(router: SglangRouter) -> None:
    response = router.http.post("/generate", json={"text": "a", "sampling_params": {"temperature": -1}})
    assert response.status_code == 400
    assert "temperature" in response.text
