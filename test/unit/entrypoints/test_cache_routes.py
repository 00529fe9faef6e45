"""Attaching a store to several replicas: all have it afterwards, or none, and the error says who could not."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpx
from fastapi import FastAPI

from moonlang.base.errors import RequestError
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Reply, Verb
from moonlang.entrypoints.cache_routes import STORE, CacheRoutes
from moonlang.entrypoints.client import EngineClient


class Replicas:
    """What the routes need of a client. refusing: what replicas answer to attempts to attach; stuck: to detach."""

    def __init__(
        self, living: tuple[int, ...], refusing: dict[int, Exception | str], stuck: tuple[int, ...] = ()
    ) -> None:
        self.args = ServerArgs(model_path="m")
        self.living = living
        self.attached: set[int] = set()
        self._refusing, self._stuck = refusing, stuck

    async def control_one(self, replica: int, verb: Verb, args: dict[str, Any], timeout_s: float) -> Reply:
        refusal = self._refusing.get(replica, "")
        if isinstance(refusal, Exception):
            raise refusal
        if verb == "attach_store":
            assert args == {"backend": "file", "extra": {"directory": "/x"}}
            self.attached |= set() if refusal else {replica}
            return Reply(1, not refusal, refusal)
        assert verb == "detach_store"
        if replica in self._stuck:
            return Reply(1, False, "It hangs.")
        self.attached.remove(replica)
        return Reply(1, True)


def put(replicas: Replicas) -> httpx.Response:
    return asyncio.run(_put(replicas))


async def _put(replicas: Replicas) -> httpx.Response:
    app = FastAPI()
    app.include_router(CacheRoutes(cast(EngineClient, replicas)).router())
    body = {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config_json": '{"directory": "/x"}'}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.put(STORE, json=body)


def test_all_of_them() -> None:
    replicas = Replicas((0, 2), {})
    response = put(replicas)
    assert (response.status_code, response.json()) == (200, {"success": True, "message": "ok"})
    assert replicas.attached == {0, 2}


def test_or_none() -> None:
    replicas = Replicas((0, 1, 2), {1: "There is no such directory."})
    response = put(replicas)
    assert response.status_code == 400
    assert response.json() == {
        "success": False,
        "message": "Replica 1: There is no such directory. It is detached from the others again.",
    }
    assert not replicas.attached


def test_one_that_does_not_answer() -> None:
    replicas = Replicas((0, 1), {0: RequestError("The scheduler did not answer.", status=504)})
    response = put(replicas)
    assert response.status_code == 504
    assert "Replica 0: The scheduler did not answer." in response.text
    assert not replicas.attached


def test_one_that_does_not_let_go() -> None:
    replicas = Replicas((0, 1), {1: "It is full."}, stuck=(0,))
    assert "Replica 0 has kept it: It hangs." in put(replicas).json()["message"]


def test_the_only_one_is_not_numbered() -> None:
    response = put(Replicas((0,), {0: "It is full."}))
    assert (response.status_code, response.json()["message"]) == (400, "It is full.")
