"""Routes as clients of SGLang know them: paths and aliases, bodies, statuses, keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_app import Served, run_served
from fake_engine import CONTEXT, LOADS

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control

ALIASES = [
    ("GET", "/health", None),
    ("GET", "/health_generate", None),
    ("GET", "/ready", None),
    ("GET", "/ping", None),
    ("GET", "/", None),
    ("HEAD", "/", None),
    ("GET", "/model_info", None),
    ("GET", "/get_model_info", None),
    ("GET", "/server_info", None),
    ("GET", "/get_server_info", None),
    ("GET", "/get_load", None),
    ("GET", "/v1/loads", None),
    ("GET", "/flush_cache", None),
    ("POST", "/flush_cache", None),
    ("POST", "/abort_request", {"rid": "x"}),
    ("POST", "/generate", {"text": "a"}),
    ("PUT", "/generate", {"text": "a"}),
    ("POST", "/v1/completions", {"prompt": "a"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models//models/fake", None),
    ("POST", "/v1/tokenize", {"prompt": "a"}),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/v1/detokenize", {"tokens": [97]}),
    ("POST", "/detokenize", {"tokens": [97]}),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ALIASES)
def test_every_route_answers(method: str, path: str, body: Any) -> None:
    async def case(it: Served) -> None:
        assert (await it.http.request(method, path, json=body)).status_code == 200

    run_served(case, metrics=True)


def test_the_reference_lists_exactly_the_routes_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text()
    documented = set(re.findall(r"`(GET|HEAD|POST|PUT|DELETE) (/\S*)`", page.partition("\n\nWith `--api-key`")[0]))

    async def case(it: Served) -> None:
        paths = (await it.http.get("/openapi.json")).json()["paths"]
        served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
        assert {(method, path.replace(":path", "")) for method, path in documented} == served

    run_served(case, metrics=True)


def test_unknown_paths_and_methods() -> None:
    async def case(it: Served) -> None:
        response = await it.http.get("/nowhere")
        assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
        assert (await it.http.get("/generate")).status_code == 405
        assert (await it.http.get("/metrics")).status_code == 404  # only with --enable-metrics

    run_served(case)


def test_model_info() -> None:
    async def case(it: Served) -> None:
        found = (await it.http.get("/model_info")).json()
        assert found["model_path"] == "/models/fake"
        assert found["is_generation"] is True
        assert found["architectures"] == ["FakeForCausalLM"]
        assert found["weight_version"] == "v7"

    run_served(case, ServerArgs(weight_version="v7"))


def test_server_info_is_flat_and_keeps_secrets() -> None:
    async def case(it: Served) -> None:
        response = await it.http.get("/server_info", headers={"authorization": "Bearer sesame"})
        found = response.json()
        assert "sesame" not in response.text
        assert (found["tp_size"], found["dp_size"], found["disaggregation_mode"]) == (1, 1, "null")
        assert found["max_total_num_tokens"] == LOADS["max_total_tokens"]
        assert found["max_req_input_len"] == CONTEXT - 1
        (state,) = found["internal_states"]
        assert state["last_gen_throughput"] == LOADS["gen_throughput"]
        assert state["memory_usage"]["token_capacity"] == LOADS["max_total_tokens"]
        assert state["effective_max_running_requests_per_dp"] == 8

    run_served(case, ServerArgs(api_key="sesame", admin_api_key="sesame2"))


def test_loads_in_both_forms() -> None:
    async def case(it: Served) -> None:
        assert (await it.http.get("/get_load")).json() == [
            {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 17}
        ]
        found = (await it.http.get("/v1/loads")).json()
        (load,) = found["loads"]
        assert (load["num_running_reqs"], load["num_waiting_reqs"], load["token_usage"]) == (2, 1, 0.3)
        assert load["queues"]["waiting"] == 1
        assert load["memory"]["token_capacity"] == 40
        (core,) = (await it.http.get("/v1/loads?include=core")).json()["loads"]
        assert "memory" not in core
        for query in ("include=core,nonsense", "dp_rank=7", "format=xml"):
            assert (await it.http.get(f"/v1/loads?{query}")).status_code == 400

    run_served(case)


def test_flush_cache() -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/flush_cache?timeout=2.5")
        assert (response.status_code, response.text[:13]) == (200, "Cache flushed")
        assert it.engine.wait_for(Control)[0].args == {"timeout_s": 2.5}
        it.engine.flush_ok = False
        response = await it.http.get("/flush_cache")
        assert (response.status_code, response.text[:18]) == (400, "Flush cache failed")
        for timeout in ("soon", "-1", "nan", "1e9"):
            assert (await it.http.get(f"/flush_cache?timeout={timeout}")).status_code == 400

    run_served(case)


def test_abort_request() -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/abort_request", json={"rid": "job_"})
        assert (response.status_code, response.content) == (200, b"")
        (abort,) = it.engine.wait_for(Abort)
        assert (abort.rid, abort.abort_all, abort.exact) == ("job_", False, False)
        assert (await it.http.post("/abort_request", json={"abort_all": True})).status_code == 200
        assert it.engine.wait_for(Abort, 2)[1].abort_all
        for body in ({}, {"rid": ""}, {"rid": None}, {"rid": 5}, []):
            assert (await it.http.post("/abort_request", json=body)).status_code == 400

    run_served(case)


def test_an_unknown_model() -> None:
    async def case(it: Served) -> None:
        assert (await it.http.get("/v1/models")).json()["data"][0]["id"] == "mine"
        assert (await it.http.get("/v1/models/mine")).json()["max_model_len"] == CONTEXT
        response = await it.http.get("/v1/models/other")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

    run_served(case, ServerArgs(served_model_name="mine"))


def test_tokenize_and_back() -> None:
    async def case(it: Served) -> None:
        found = (await it.http.post("/v1/tokenize", json={"prompt": "ab"})).json()
        assert found == {"tokens": [97, 98], "count": 2, "max_model_len": CONTEXT}
        found = (await it.http.post("/v1/tokenize", json={"prompt": ["a", "bc"]})).json()
        assert (found["tokens"], found["count"]) == ([[97], [98, 99]], [1, 2])
        messages = [{"role": "user", "content": "x"}]
        found = (await it.http.post("/v1/tokenize", json={"messages": messages})).json()
        assert bytes(found["tokens"]) == b"u:x;a:"
        assert (await it.http.post("/detokenize", json={"tokens": [97, 98]})).json() == {"text": "ab"}
        assert (await it.http.post("/detokenize", json={"tokens": [[97], [98]]})).json() == {"text": ["a", "b"]}
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": []}),
            ("/tokenize", {"prompt": "a", "messages": messages}),
            ("/detokenize", {"tokens": ["a"]}),
            ("/detokenize", {"tokens": [10**6]}),
            ("/detokenize", {"tokens": [[1], 2]}),
        ):
            assert (await it.http.post(path, json=body)).status_code == 400

    run_served(case)


def test_v1_routes_want_json() -> None:
    async def case(it: Served) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            response = await it.http.post("/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": kind})
            assert response.status_code == 400
            assert response.json()["message"].startswith("Unsupported Media Type")
        headers = {"content-type": "application/json; charset=utf-8"}
        response = await it.http.post("/v1/completions", content=b'{"prompt":"a"}', headers=headers)
        assert response.status_code == 200

    run_served(case)


def key(value: str) -> dict[str, str]:
    return {"authorization": f"Bearer {value}"}


async def status(http: httpx.AsyncClient, path: str, headers: dict[str, str]) -> int:
    return (await http.get(path, headers=headers)).status_code


def test_api_key() -> None:
    async def case(it: Served) -> None:
        response = await it.http.get("/v1/models")
        assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"})
        for wrong in ("wrong", "keykey", ""):
            assert await status(it.http, "/v1/models", key(wrong)) == 401
        assert await status(it.http, "/v1/models", {"authorization": "key"}) == 401
        assert await status(it.http, "/v1/models", key("key")) == 200
        assert await status(it.http, "/flush_cache", key("key")) == 200
        for path in ("/health", "/health_generate", "/ready"):
            assert await status(it.http, path, {}) == 200

    run_served(case, ServerArgs(api_key="key"))


def test_admin_api_key() -> None:
    async def case(it: Served) -> None:
        assert await status(it.http, "/flush_cache", key("key")) == 401
        assert await status(it.http, "/flush_cache", key("admin")) == 200
        assert await status(it.http, "/v1/models", key("key")) == 200
        assert await status(it.http, "/v1/models", {}) == 401

    run_served(case, ServerArgs(api_key="key", admin_api_key="admin"))

    async def admin_only(it: Served) -> None:
        assert await status(it.http, "/flush_cache", {}) == 401
        assert await status(it.http, "/v1/models", {}) == 200

    run_served(admin_only, ServerArgs(admin_api_key="admin"))


def test_cors_is_open_even_without_a_key() -> None:
    async def case(it: Served) -> None:
        headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
        response = await it.http.options("/v1/chat/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://a.example"
        response = await it.http.get("/v1/models", headers={"origin": "http://a.example"})
        assert response.status_code == 401
        assert "access-control-allow-origin" in response.headers

    run_served(case, ServerArgs(api_key="key"))


def test_health_says_503_when_the_engine_is_silent_starting_or_gone() -> None:
    async def case(it: Served) -> None:
        it.health.state = "Starting"
        assert await status(it.http, "/health", {}) == 503
        assert await status(it.http, "/ready", {}) == 503
        it.health.state = "Up"
        it.engine.silent = True
        assert await status(it.http, "/health", {}) == 503
        assert it.health.state == "UnHealthy"
        it.engine.silent = False
        it.client.fail("Gone.")
        assert await status(it.http, "/health", {}) == 503
        assert await status(it.http, "/get_load", {}) == 503
        response = await it.http.post("/generate", json={"text": "a"})
        assert (response.status_code, response.json()["code"]) == (503, 503)

    run_served(case)


def test_metrics_are_scraped_without_a_key_and_count_requests() -> None:
    async def case(it: Served) -> None:
        await it.http.post("/generate", json={"text": "abc"}, headers=key("key"))
        await it.http.get("/nowhere/at/all", headers=key("key"))
        text = (await it.http.get("/metrics")).text
        assert 'sglang:http_responses_total{endpoint="/generate",method="POST",status_code="200"} 1.0' in text
        assert 'endpoint="other"' in text
        assert "nowhere" not in text
        labels = 'engine_type="unified",model_name="fake",moe_ep_rank="0",pp_rank="0",tp_rank="0"'
        assert f"sglang:num_running_reqs{{{labels}}} 2.0" in text
        assert 'sglang:generation_tokens_total{engine_type="unified",is_streaming="False"' in text
        it.engine.silent = True

    run_served(case, ServerArgs(api_key="key"), metrics=True)
