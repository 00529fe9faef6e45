"""A router in front of prefill and decode servers: both are asked at once, and end together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from fake_worker import Answer, FakeWorker, Routed, run_routed, tell

BODY = {"text": "hello"}


def prefill(name: str = "p", answer: Answer = tell) -> Callable[[], FakeWorker]:
    return lambda: FakeWorker(name, "prefill", answer)


def decode(name: str = "d", answer: Answer = tell) -> Callable[[], FakeWorker]:
    return lambda: FakeWorker(name, "decode", answer)


async def hang(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    await worker.gate.wait()
    return await tell(worker, request, body)


def refuse(status: int) -> Answer:
    async def answer(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response({"from": worker.name}, status=status)

    return answer


def test_both_get_the_place_and_decode_answers() -> None:
    async def case(it: Routed) -> None:
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            for stream in (False, True):
                response = await it.http.post(path, json={**BODY, "stream": stream})
                assert response.status_code == 200
                assert '"d"' in response.text
                assert '"p"' not in response.text
                front, back = (worker.bodies[-1] for worker in it.workers)
                assert front == back
                assert (front["bootstrap_host"], front["bootstrap_port"]) == ("127.0.0.1", 9000)
                assert 0 <= front["bootstrap_room"] < 1 << 63

    run_routed(case, prefill(), decode())


def test_a_batch_gets_as_many_rooms() -> None:
    async def case(it: Routed) -> None:
        for body in ({"text": ["a", "b", "c"]}, {"input_ids": [[1], [2], [3]]}, {"prompt": ["x", "y", "z"]}):
            await it.http.post("/v1/completions", json=body)
            found = it.workers[1].bodies[-1]
            assert found["bootstrap_host"] == ["127.0.0.1"] * 3
            assert found["bootstrap_port"] == [9000] * 3
            assert len(set(found["bootstrap_room"])) == 3

    run_routed(case, prefill(), decode())


def test_rooms_differ() -> None:
    async def case(it: Routed) -> None:
        for _ in range(5):
            await it.http.post("/generate", json=BODY)
        assert len({body["bootstrap_room"] for body in it.workers[0].bodies}) == 5

    run_routed(case, prefill(), decode())


@pytest.mark.parametrize("status", [400, 422])
def test_what_either_refuses_is_refused_and_ends_the_other(status: int) -> None:
    async def front_refuses(it: Routed) -> None:
        response = await it.http.post("/generate", json=BODY)
        assert (response.status_code, response.json()) == (status, {"from": "p"})
        await it.workers[1].aborted.wait()

    run_routed(front_refuses, prefill(answer=refuse(status)), decode(answer=hang))

    async def back_refuses(it: Routed) -> None:
        response = await it.http.post("/generate", json=BODY)
        assert (response.status_code, response.json()) == (status, {"from": "d"})
        await it.workers[0].aborted.wait()

    run_routed(back_refuses, prefill(answer=hang), decode(answer=refuse(status)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_pair_that_fails_is_replaced_by_another(stream: bool) -> None:
    async def case(it: Routed) -> None:
        p1, _, d1, _ = it.workers
        asked = asyncio.create_task(it.http.post("/generate", json={**BODY, "stream": stream}))
        await asyncio.gather(p1.arrived.wait(), d1.arrived.wait())
        await p1.stop()
        response = await asked
        assert response.status_code == 200
        assert '"d2"' in response.text
        await d1.aborted.wait()  # it was not left waiting for a prefill server that is gone
        rooms = {worker.bodies[0]["bootstrap_room"] for worker in it.workers}
        assert len(rooms) == 2

    makers = (prefill("p1", hang), prefill("p2"), decode("d1", hang), decode("d2"))
    run_routed(case, *makers, policy="round_robin", decode_policy="round_robin")


def test_a_client_that_leaves_ends_both() -> None:
    async def case(it: Routed) -> None:
        asked = asyncio.create_task(it.http.post("/generate", json=BODY))
        await asyncio.gather(*(worker.arrived.wait() for worker in it.workers))
        asked.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*(worker.aborted.wait() for worker in it.workers))
        await it.until(lambda: all(worker.active == 0 for worker in it.parts.workers))

    run_routed(case, prefill(answer=hang), decode(answer=hang))


def test_a_prefill_server_may_end_its_answer_after_the_whole() -> None:
    async def case(it: Routed) -> None:
        assert (await it.http.post("/generate", json=BODY)).json() == {"text": "d"}
        front = it.parts.workers.of("prefill")[0]
        assert front.active == 1
        it.workers[0].gate.set()
        await it.until(lambda: front.active == 0)
        assert not it.workers[0].aborted.is_set()

    run_routed(case, prefill(answer=hang), decode())


async def with_logprobs(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    mine = [[None, 1, None], [-0.5, 2, None]] if worker.mode == "prefill" else []
    answer = {"text": worker.name, "meta_info": {"input_token_logprobs": mine}}
    if not body["stream"]:
        return web.json_response(answer)
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: " + json.dumps(answer).encode() + b"\n\ndata: [DONE]\n\n")
    return response


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompts_log_probabilities_come_from_the_prefill_server(stream: bool) -> None:
    async def case(it: Routed) -> None:
        body = {**BODY, "return_logprob": True, "logprob_start_len": 0, "stream": stream}
        text = (await it.http.post("/generate", json=body)).text
        found = json.loads(text.removeprefix("data: ").split("\n\n")[0])
        assert found == {"text": "d", "meta_info": {"input_token_logprobs": [[None, 1, None], [-0.5, 2, None]]}}
        assert text.endswith("data: [DONE]\n\n") is stream

    run_routed(case, prefill(answer=with_logprobs), decode(answer=with_logprobs))


def test_a_missing_half_is_named() -> None:
    async def case(it: Routed) -> None:
        await it.workers[1].stop()
        await it.until(lambda: not it.parts.workers.of("decode")[0].up)
        response = await it.http.post("/generate", json=BODY)
        assert response.status_code == 503
        assert "No decode worker is up." in response.json()["error"]["message"]
        assert (await it.http.get("/health")).status_code == 503
        assert (await it.http.get("/v1/models")).status_code == 200  # one half is enough for this

    run_routed(case, prefill(), decode())


def test_a_server_in_the_wrong_place_is_named() -> None:
    async def case(it: Routed) -> None:
        await it.http.post(
            "/workers", json={"url": it.workers[0].url.replace("127.0.0.1", "localhost"), "worker_type": "decode"}
        )
        found = it.parts.workers.of("decode")[1]
        await it.until(lambda: found.up)
        assert "prefill" in found.problem
        for _ in range(4):
            assert (await it.http.post("/generate", json=BODY)).json() == {"text": "d"}

    run_routed(case, prefill(), decode())


def test_routes_that_pairs_do_not_serve() -> None:
    async def case(it: Routed) -> None:
        response = await it.http.post("/v1/embeddings", json={"input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (501, "not_implemented")
        assert (await it.http.post("/tokenize", json={"prompt": "a"})).json() == {"text": "p"}

    run_routed(case, prefill(), decode())


def test_server_info_lists_both_kinds() -> None:
    async def case(it: Routed) -> None:
        found = (await it.http.get("/get_server_info")).json()
        assert [len(found["prefill"]), len(found["decode"]), found["internal_states"]] == [1, 1, ["p", "d"]]

    run_routed(case, prefill(), decode())
