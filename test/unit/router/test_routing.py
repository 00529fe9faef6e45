"""A router in front of servers that work alone: passing on, trying again, giving up."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from aiohttp import web
from fake_worker import Answer, FakeWorker, Routed, run_routed, stream, tell

BODY = {"text": "hello"}


def worker(name: str, answer: Answer = tell) -> Callable[[], FakeWorker]:
    return lambda: FakeWorker(name, answer=answer)


def failing(status: int) -> Answer:
    async def answer(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response({"from": worker.name}, status=status)

    return answer


async def cut_off(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    """Hangs up without a word."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]


def test_bodies_headers_and_queries_go_on_as_they_are() -> None:
    async def case(it: Routed) -> None:
        body = {"text": "a", "unknown": [1.5, {"deep": None}]}
        headers = {"authorization": "Bearer k", "x-request-id": "7"}
        for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
            response = await it.http.post(path + "?a=b", json=body, headers=headers)
            assert (response.status_code, response.json()) == (200, {"text": "a"})
        assert it.workers[0].bodies == [body] * 4
        sent = it.workers[0].headers[-1]
        assert (sent["authorization"], sent["x-request-id"]) == ("Bearer k", "7")
        assert sent["content-type"] == "application/json"

    run_routed(case, worker("a"))


def test_a_stream_goes_on_piece_by_piece() -> None:
    async def case(it: Routed) -> None:
        it.workers[0].free_events = 1
        async with it.http.stream("POST", "/generate", json={**BODY, "stream": True}) as response:
            assert response.headers["content-type"] == "text/event-stream"
            lines = response.aiter_lines()
            assert json.loads((await anext(lines))[6:])["number"] == 0  # while the server holds the rest back
            it.workers[0].gate.set()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 3

    run_routed(case, worker("a"))


def test_round_robin_and_selection_counts() -> None:
    async def case(it: Routed) -> None:
        found = [(await it.http.post("/generate", json=BODY)).json()["text"] for _ in range(4)]
        assert found == ["a", "b", "a", "b"]
        url = it.workers[0].url
        assert await it.metric(f'smg_worker_selection_total{{worker="{url}",worker_type="regular"}}') == 2

    run_routed(case, worker("a"), worker("b"), policy="round_robin")


def test_equal_prefixes_meet_on_one_server() -> None:
    async def case(it: Routed) -> None:
        homes: dict[str, Counter[str]] = {}
        for turn in range(3):
            for letter in "abcd":
                messages = [{"role": "user", "content": letter * 1000 + "!" * turn}]
                answer = (await it.http.post("/v1/chat/completions", json={"messages": messages})).json()
                homes.setdefault(letter, Counter())[answer["text"]] += 1
        assert all(len(home) == 1 for home in homes.values())
        assert len({next(iter(home)) for home in homes.values()}) == 2

    run_routed(case, worker("a"), worker("b"))


@pytest.mark.parametrize("bad", [failing(503), failing(500), failing(429), cut_off], ids=["503", "500", "429", "cut"])
def test_what_one_cannot_another_may(bad: Answer) -> None:
    async def case(it: Routed) -> None:
        for streaming in (False, True, False, True):
            response = await it.http.post("/generate", json={**BODY, "stream": streaming})
            assert response.status_code == 200
            assert '"good"' in response.text
        assert await it.metric('smg_router_retries_total{endpoint="/generate"}') == len(it.workers[0].bodies) > 0

    run_routed(case, worker("bad", bad), worker("good"), policy="round_robin")


def test_what_is_the_clients_fault_is_not_tried_again() -> None:
    async def case(it: Routed) -> None:
        for count, status in enumerate((400, 404, 413, 401), 1):
            it.workers[0].answer = failing(status)
            response = await it.http.post("/generate", json=BODY)
            assert (response.status_code, response.json()) == (status, {"from": "a"})
            assert len(it.workers[0].bodies) == count

    run_routed(case, worker("a"))


def test_the_last_refusal_is_passed_on() -> None:
    async def case(it: Routed) -> None:
        response = await it.http.post("/generate", json=BODY)
        assert (response.status_code, response.json()) == (503, {"from": "a"})
        assert len(it.workers[0].bodies) == 3

    run_routed(case, worker("a", failing(503)), retry_max_retries=2)


def test_without_retries_the_first_failure_is_the_answer() -> None:
    async def case(it: Routed) -> None:
        response = await it.http.post("/generate", json=BODY)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        error = response.json()["error"]
        assert error["code"] == "worker_failed"
        assert "broke off" in error["message"]

    run_routed(case, worker("a", cut_off), disable_retries=True)


def test_a_server_that_is_gone_is_noticed_by_the_request_and_comes_back() -> None:
    async def case(it: Routed) -> None:
        gone = it.workers[0]
        await gone.stop()
        found = {(await it.http.post("/generate", json=BODY)).json()["text"] for _ in range(4)}
        assert found == {"b"}
        assert await it.metric(f'smg_worker_health{{worker="{gone.url}",worker_type="regular"}}') == 0
        await gone.start()
        await it.until(lambda: all(worker.up for worker in it.parts.workers))
        found = {(await it.http.post("/generate", json=BODY)).json()["text"] for _ in range(4)}
        assert found == {"a", "b"}

    run_routed(case, worker("a"), worker("b"), policy="round_robin", health_check_interval_secs=60)


def test_a_server_that_says_it_is_unwell_gets_nothing() -> None:
    async def case(it: Routed) -> None:
        it.workers[0].healthy = False
        await it.until(lambda: not it.parts.workers.of("regular")[0].up)
        assert {(await it.http.post("/generate", json=BODY)).json()["text"] for _ in range(4)} == {"b"}

    run_routed(case, worker("a"), worker("b"), policy="round_robin")


def test_nobody_there() -> None:
    async def case(it: Routed) -> None:
        await it.workers[0].stop()
        await it.until(lambda: not it.parts.workers.of("regular")[0].up)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            response = await it.http.post(path, json=BODY)
            assert response.status_code == 503
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("Service Unavailable", "server_selection_failed")
        assert (await it.http.get("/v1/models")).status_code == 503
        assert (await it.http.get("/health")).status_code == 503
        assert (await it.http.get("/liveness")).status_code == 200

    run_routed(case, worker("a"))


async def breaks(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    """Two events and a half, then nothing."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"number": 0}\n\ndata: {"number": 1}\n\ndata: {"num')
    await asyncio.sleep(0)
    assert request.transport is not None
    request.transport.close()
    return response


def test_a_stream_that_breaks_says_so() -> None:
    async def case(it: Routed) -> None:
        async with it.http.stream("POST", "/generate", json={**BODY, "stream": True}) as response:
            *_, error, done = await events(response)
        assert done == "[DONE]"
        found = json.loads(error)["error"]
        assert (found["code"], found["retryable"]) == ("worker_failed", True)
        assert len(it.workers[0].bodies) == 1  # a byte was out: nothing is tried again

    run_routed(case, worker("a", breaks))


async def hang(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    await worker.gate.wait()
    return web.json_response({"text": worker.name})


def test_a_hung_server_is_given_up_and_its_request_served_elsewhere() -> None:
    async def case(it: Routed) -> None:
        asked = asyncio.create_task(it.http.post("/generate", json=BODY))
        await it.workers[0].arrived.wait()
        it.workers[0].healthy = False
        assert (await asked).json() == {"text": "b"}
        await it.workers[0].aborted.wait()

    run_routed(case, worker("a", hang), worker("b"), policy="round_robin")


def test_a_hung_stream_is_ended_with_an_error() -> None:
    async def case(it: Routed) -> None:
        it.workers[0].free_events = 1
        async with it.http.stream("POST", "/generate", json={**BODY, "stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            it.workers[0].healthy = False
            rest = [line async for line in lines if line]
        assert "does not answer any more" in rest[-2]
        assert rest[-1] == "data: [DONE]"

    run_routed(case, worker("a"))


def test_a_client_that_leaves_takes_its_request_along() -> None:
    async def case(it: Routed) -> None:
        server = it.workers[0]
        server.free_events = 1
        for count, streaming in enumerate((False, True), 1):
            server.arrived.clear()
            server.aborted.clear()
            asked = asyncio.create_task(it.http.post("/generate", json={**BODY, "stream": streaming}))
            async with asyncio.timeout(60):
                await server.arrived.wait()
                asked.cancel()
                await server.aborted.wait()
            await it.until(lambda: it.parts.workers.of("regular")[0].active == 0)
            assert await it.metric("smg_router_aborts_total") == count
        assert (await it.http.get("/v1/models")).status_code == 200

    run_routed(case, worker("a", stream_or_hang))


async def stream_or_hang(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    return await (stream(worker, request, 3) if body["stream"] else hang(worker, request, body))


def test_bad_bodies_do_not_reach_a_server() -> None:
    async def case(it: Routed) -> None:
        for content in (b"", b"{", b"[1]", b'{"text": "a",}'):
            response = await it.http.post("/generate", content=content)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "bad_request"
        response = await it.http.post("/generate", content=b'{"text": "' + b"x" * 2000 + b'"}')
        assert response.status_code == 413
        assert (await it.http.post("/nowhere", json=BODY)).status_code == 404
        assert (await it.http.get("/generate")).status_code == 405
        assert it.workers[0].bodies == []

    run_routed(case, worker("a"), max_payload_size=1000)


def test_too_many_at_once() -> None:
    async def case(it: Routed) -> None:
        asked = asyncio.create_task(it.http.post("/generate", json=BODY))
        await it.workers[0].arrived.wait()
        response = await it.http.post("/generate", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_requests")
        it.workers[0].gate.set()
        assert (await asked).status_code == 200

    run_routed(case, worker("a", hang), max_concurrent_requests=1)


def test_a_breaker_opens_on_failures_and_not_on_refusals() -> None:
    async def case(it: Routed) -> None:
        for _ in range(4):
            await it.http.post("/generate", json=BODY)
        shown = (await it.http.get("/workers")).json()["workers"][0]
        assert shown["circuit_breaker"] == "closed"
        it.workers[0].answer = failing(500)
        for _ in range(2):
            assert (await it.http.post("/generate", json=BODY)).status_code == 500
        response = await it.http.post("/generate", json=BODY)
        assert response.json()["error"]["code"] == "server_selection_failed"
        assert len(it.workers[0].bodies) == 6

    run_routed(case, worker("a", failing(503)), disable_retries=True, cb_failure_threshold=2)


def test_a_client_that_leaves_in_the_middle_of_its_body() -> None:
    async def case(it: Routed) -> None:
        port = int(str(it.http.base_url).rpartition(":")[2].strip("/"))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await it.http.post("/generate", json=BODY)).status_code == 200
        assert len(it.workers[0].bodies) == 1

    run_routed(case, worker("a"))


def test_names_of_models_go_on_as_they_are_written() -> None:
    async def case(it: Routed) -> None:
        await it.http.get("/v1/models/org%2Fname%20x/y?a=b%20c")
        assert "/v1/models/org%2Fname%20x/y?a=b%20c" in it.workers[0].raw_paths

    run_routed(case, worker("a"))


def test_a_server_that_refuses_checks_is_down_at_once() -> None:
    async def case(it: Routed) -> None:
        await it.workers[0].stop()
        await it.until(lambda: not it.parts.workers.of("regular")[0].up)

    run_routed(case, worker("a"), health_failure_threshold=1000)
