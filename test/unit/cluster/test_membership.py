"""The router's list follows what runs here, also when the router forgets it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from fake_worker import FakeWorker, Routed, run_routed, tell

from moonlang.base.errors import PeerError
from moonlang.cluster.membership import Membership

Wanted = dict[str, tuple[str, str]]
BODY = {"text": "hello"}


async def hang(worker: FakeWorker, request: web.Request, body: object) -> web.StreamResponse:
    await worker.gate.wait()
    return await tell(worker, request, body)


def with_membership(case: Callable[[Routed, Membership, Wanted, FakeWorker], Awaitable[None]]) -> None:
    """A router with a server that is not ours, and one of ours that is not in its list yet."""

    async def main(it: Routed) -> None:
        late = FakeWorker("late", answer=hang)
        await late.start()
        wanted: Wanted = {}
        membership = Membership(str(it.http.base_url).rstrip("/"), "", lambda: wanted, lambda: None)
        running = asyncio.create_task(membership.run())
        try:
            await case(it, membership, wanted, late)
        finally:
            running.cancel()
            await late.stop()

    run_routed(main, lambda: FakeWorker("a"), policy="round_robin")


def test_it_is_put_in_and_taken_out() -> None:
    async def case(it: Routed, membership: Membership, wanted: Wanted, late: FakeWorker) -> None:
        wanted[late.url] = ("regular", "server-0")
        membership.hurry()
        await it.until(lambda: membership.healthy(late.url))
        assert [(one.name, one.load) for one in membership.listed if one.url == late.url] == [("server-0", 0)]
        wanted.clear()
        await membership.gone(late.url, 60)
        assert [worker.url for worker in it.parts.workers] == [it.workers[0].url], "those of others stay"

    with_membership(case)


def test_a_router_that_forgets_is_told_again() -> None:
    async def case(it: Routed, membership: Membership, wanted: Wanted, late: FakeWorker) -> None:
        wanted[late.url] = ("regular", "server-0")
        membership.hurry()
        await it.until(lambda: membership.healthy(late.url))
        await it.http.delete(f"/workers/{late.url}")
        await it.until(lambda: not membership.healthy(late.url))
        await it.until(lambda: membership.healthy(late.url))

    with_membership(case)


def test_it_is_not_gone_while_it_has_requests() -> None:
    async def case(it: Routed, membership: Membership, wanted: Wanted, late: FakeWorker) -> None:
        wanted[late.url] = ("regular", "server-0")
        membership.hurry()
        await it.until(lambda: membership.healthy(late.url))
        asked = [asyncio.create_task(it.http.post("/generate", json=BODY)) for _ in range(2)]
        await late.arrived.wait()
        wanted.clear()
        with pytest.raises(PeerError, match="still has requests"):
            await membership.gone(late.url, 0.3)
        wanted[late.url] = ("regular", "server-0")  # then it comes back
        membership.hurry()
        await it.until(lambda: membership.healthy(late.url))
        wanted.clear()
        late.gate.set()
        await membership.gone(late.url, 60)
        assert sorted([(await one).json()["text"] for one in asked]) == ["a", "late"]

    with_membership(case)


def test_a_router_that_is_not_there_yet_is_waited_for() -> None:
    async def main() -> None:
        membership = Membership("http://127.0.0.1:9", "", dict, lambda: None)
        running = asyncio.create_task(membership.run())
        await asyncio.sleep(0.05)
        assert membership.listed == []
        assert not running.done()
        running.cancel()

    asyncio.run(main())
