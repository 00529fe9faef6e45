"""Workers that come and go, keys, and what the router says of itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_worker import FakeWorker, Routed, run_routed, tell

from moonlang.disaggregation.frames import TOKEN_VARIABLE

BODY = {"text": "hello"}


async def hang(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    await worker.gate.wait()
    return await tell(worker, request, body)


def test_a_worker_comes_while_the_router_runs() -> None:
    async def case(it: Routed) -> None:
        late = FakeWorker("late")
        await late.start()
        response = await it.http.post("/workers", json={"url": late.url})
        assert (response.status_code, response.json()["status"]) == (202, "accepted")
        assert (await it.http.post("/workers", json={"url": late.url})).status_code == 400
        place = response.json()["location"]
        await it.until(lambda: it.parts.workers.of("regular")[1].up)
        found = (await it.http.get(place)).json()
        assert (found["url"], found["is_healthy"], found["worker_type"]) == (late.url, True, "regular")
        assert {(await it.http.post("/generate", json=BODY)).json()["text"] for _ in range(4)} == {"a", "late"}
        await late.stop()

    run_routed(case, lambda: FakeWorker("a"), policy="round_robin")


def test_a_worker_leaves_when_its_requests_are_done() -> None:
    async def case(it: Routed) -> None:
        first = it.workers[0]
        asked = asyncio.create_task(it.http.post("/generate", json=BODY))
        await first.arrived.wait()
        response = await it.http.delete(f"/workers/{first.url}")
        assert (response.status_code, response.json()["requests_left"]) == (202, 1)
        for _ in range(3):
            assert (await it.http.post("/generate", json=BODY)).json() == {"text": "b"}
        shown = (await it.http.get("/workers")).json()["workers"]
        assert [worker["is_leaving"] for worker in shown] == [True, False]
        first.gate.set()
        assert (await asked).json() == {"text": "a"}
        await it.until(lambda: len(it.parts.workers) == 1)
        assert (await it.http.delete("/workers/1")).status_code == 404

    run_routed(case, lambda: FakeWorker("a", answer=hang), lambda: FakeWorker("b"), policy="round_robin")


def test_workers_that_cannot_be() -> None:
    async def case(it: Routed) -> None:
        for body in (
            {"url": "ftp://x"},
            {"url": "http://x:1", "worker_type": "decode"},
            {"worker_type": "regular"},
            {},
        ):
            response = await it.http.post("/workers", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["message"]
        assert len(it.parts.workers) == 1

    run_routed(case, lambda: FakeWorker("a"))


def test_the_key_opens_everything_but_health() -> None:
    async def case(it: Routed) -> None:
        for path in ("/v1/models", "/workers", "/get_loads"):
            response = await it.http.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
        assert (await it.http.post("/generate", json=BODY)).status_code == 401
        for path in ("/health", "/liveness", "/readiness", "/metrics"):
            assert (await it.http.get(path)).status_code == 200
        headers = {"authorization": "Bearer key"}
        assert (await it.http.post("/generate", json=BODY, headers=headers)).status_code == 200
        assert it.workers[0].headers[0]["authorization"] == "Bearer key"

    run_routed(case, lambda: FakeWorker("a"), api_key="key")


def test_management_reaches_every_worker() -> None:
    async def case(it: Routed) -> None:
        response = await it.http.post("/flush_cache?timeout=3")
        assert (response.status_code, response.json()["workers_flushed"]) == (200, 2)
        assert (await it.http.post("/abort_request", json={"rid": "x"})).status_code == 200
        for worker in it.workers:
            assert "POST /flush_cache?timeout=3" in worker.asked
            assert "POST /abort_request" in worker.asked
        assert (await it.http.get("/get_load")).json() == [{"dp_rank": 0, "num_tokens": 7}] * 2
        loads = (await it.http.get("/get_loads")).json()["workers"]
        assert loads == [{"worker": worker.url, "load": 7} for worker in it.workers]
        assert (await it.http.get("/get_server_info")).json()["internal_states"] == ["a", "b"]
        assert (await it.http.get("/health_generate")).status_code == 200
        assert (await it.http.get("/")).status_code == 200

    run_routed(case, lambda: FakeWorker("a"), lambda: FakeWorker("b"))


def test_metrics_tell_what_happened() -> None:
    async def case(it: Routed) -> None:
        await it.http.post("/generate", json=BODY)
        await it.http.post("/generate", json={**BODY, "stream": True})
        labels = f'{{worker="{it.workers[0].url}",worker_type="regular"}}'
        assert await it.metric('smg_router_requests_total{endpoint="/generate",streaming="true"}') == 1
        assert await it.metric('smg_http_responses_total{status_code="200"}') == 2
        assert await it.metric('smg_router_upstream_responses_total{status_code="200"}') == 2
        assert await it.metric('smg_router_ttft_seconds_count{endpoint="/generate"}') == 2
        assert await it.metric(f"smg_worker_health{labels}") == 1
        assert await it.metric(f"smg_worker_requests_active{labels}") == 0
        assert await it.metric('smg_worker_pool_size{worker_type="regular"}') == 1
        assert await it.metric("smg_http_connections_active") == 0

    run_routed(case, lambda: FakeWorker("a"))


def test_with_a_token_only_its_owner_changes_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    card = tmp_path / "card.json"
    card.write_text('{"name": "moon"}')
    knows = {"x-moonlang-cluster-token": "secret"}

    async def case(it: Routed) -> None:
        url = it.workers[0].url
        for headers in ({}, {"x-moonlang-cluster-token": "guess"}, {"authorization": "Bearer key"}):
            assert (await it.http.get("/cluster", headers=headers)).status_code == 401
            assert (await it.http.delete(f"/workers/{url}", headers=headers)).status_code == 401
            assert (await it.http.post("/workers", json={"url": url}, headers=headers)).status_code == 401
        assert (await it.http.get("/workers")).status_code == 401  # that is a matter of the key
        assert (await it.http.get("/workers", headers={"authorization": "Bearer key"})).status_code == 200
        assert (await it.http.post("/generate", json=BODY, headers=knows)).status_code == 401
        assert (await it.http.get("/cluster", headers=knows)).json() == {"name": "moon"}
        added = {"url": "http://127.0.0.1:9", "name": "server-7"}
        assert (await it.http.post("/workers", json=added, headers=knows)).status_code == 202
        shown = (await it.http.get("/workers", headers=knows)).json()["workers"]
        assert [worker["name"] for worker in shown] == ["", "server-7"]

    run_routed(case, lambda: FakeWorker("a"), api_key="key", cluster_card=str(card))


def test_a_router_without_a_cluster_says_so() -> None:
    async def case(it: Routed) -> None:
        assert (await it.http.get("/cluster")).status_code == 404

    run_routed(case, lambda: FakeWorker("a"))
