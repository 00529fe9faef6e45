"""Management of the hierarchical cache while the server runs: attach, detach and clear the store, describe its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.core.messages import Verb
from moonlang.entrypoints import errors, exchange
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import json_response

STORE = "/hicache/storage-backend"
CLEAR = f"{STORE}/clear"
MANAGEMENT = frozenset({STORE, CLEAR})
_PATIENCE_S = 60  # the scheduler answers before


class AttachBody(msgspec.Struct, kw_only=True):
    """PUT /hicache/storage-backend. The policies can only be those that the server was started with."""

    hicache_storage_backend: str
    hicache_storage_backend_extra_config_json: str | None = None
    hicache_storage_prefetch_policy: str | None = None
    hicache_write_policy: str | None = None


class CacheRoutes:
    """Calls the scheduler and answers {"success": ..., "message": ...} with 200 or 400."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def router(self) -> APIRouter:
        router = APIRouter(tags=["cache"])
        for path, handler, method in (
            (STORE, self.status, "GET"),
            (STORE, self.attach, "PUT"),
            (STORE, self.detach, "DELETE"),
            (CLEAR, self.clear, "POST"),
            ("/get_hicache_l3_cache_layout", self.layout, "GET"),
        ):
            router.add_api_route(path, handler, methods=[method], response_model=None)
        return router

    async def status(self) -> Response:
        """Which store is attached."""
        args = self._client.args
        try:
            reply = await self._client.control("store")
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        return json_response(
            {
                "hicache_storage_backend": reply.body.get("backend") or None,
                "hicache_storage_backend_extra_config": args.hicache_storage_backend_extra_config,
                "hicache_storage_prefetch_policy": args.hicache_storage_prefetch_policy,
                "hicache_write_policy": args.hicache_write_policy,
            }
        )

    async def attach(self, request: Request) -> Response:
        """Open a store and use it from now on: on all replicas, or on none."""
        try:
            body = await exchange.read_json(request, AttachBody)
            extra = _extra(body.hicache_storage_backend_extra_config_json)
            self._refuse_other_policies(body)
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        return await self._attach({"backend": body.hicache_storage_backend, "extra": extra})

    async def detach(self) -> Response:
        """Use the store no more, and close it when its work is done."""
        return await self._call("detach_store", {})

    async def clear(self) -> Response:
        """Remove every page of this model from the store, for all servers that share it."""
        return await self._call("clear_store", {})

    async def layout(self) -> Response:
        """What a router must know to compute the names of objects in the store."""
        args, engine = self._client.args, self._client.ready.get("scheduler", {})
        try:
            backend = (await self._client.control("store")).body.get("backend") or None
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        pool = {"pool": "kv", "suffixes": [""], "hit_policy": "ALL_PAGES", "trailing_pages": 0}
        prefix = f"{(args.served_model_name or '').replace('/', '-')}_{engine.get('kv_digest', '')[:16]}_"
        return json_response(
            {
                "enabled": backend is not None,
                "backend": backend,
                "page_size": engine.get("page_size"),
                "hicache_object_layout": {
                    "pools": [pool],
                    "key_prefix": prefix,
                    "is_mla_backend": bool(engine.get("kv_latent")),
                    "pp_rank": 0,
                    "pp_size": 1,
                },
                "reason": "" if backend is not None else "There is no store: see --hicache-storage-backend.",
            }
        )

    async def _attach(self, args: dict[str, Any]) -> Response:
        """A request may go to any replica: where one cannot have the store, the others let go of it again."""
        replicas = self._client.living
        refusals = dict(zip(replicas, await self._on_each(replicas, "attach_store", args), strict=True))
        failed = {replica: error for replica, error in refusals.items() if error is not None}
        attached = [replica for replica in replicas if replica not in failed]
        if not failed:
            return json_response({"success": True, "message": "ok"})
        back = await self._on_each(attached, "detach_store", {})
        parts = [f"Replica {replica}: {error}" for replica, error in failed.items()]
        parts += ["It is detached from the others again."] if attached else []
        parts += [f"Replica {i} has kept it: {error}" for i, error in zip(attached, back, strict=True) if error]
        first = next(iter(failed.values()))
        message = " ".join(parts) if len(replicas) > 1 else str(first)
        if first.status == 400:
            return json_response({"success": False, "message": message}, 400)
        return json_response(errors.native(RequestError(message, status=first.status)), first.status)

    async def _on_each(self, replicas: Sequence[int], verb: Verb, args: dict[str, Any]) -> list[RequestError | None]:
        """Call each of them; why it has not done it, None where it has."""

        async def call(replica: int) -> RequestError | None:
            try:
                reply = await self._client.control_one(replica, verb, args, timeout_s=_PATIENCE_S)
            except RequestError as error:
                return error
            return None if reply.ok else RequestError(reply.message)

        return await asyncio.gather(*(call(replica) for replica in replicas))

    async def _call(self, verb: Verb, args: dict[str, Any]) -> Response:
        try:
            reply = await self._client.control(verb, args, timeout_s=_PATIENCE_S)
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        return json_response({"success": reply.ok, "message": reply.message or "ok"}, 200 if reply.ok else 400)

    def _refuse_other_policies(self, body: AttachBody) -> None:
        args = self._client.args
        for given, present, flag in (
            (body.hicache_write_policy, args.hicache_write_policy, "--hicache-write-policy"),
            (
                body.hicache_storage_prefetch_policy,
                args.hicache_storage_prefetch_policy,
                "--hicache-storage-prefetch-policy",
            ),
        ):
            if given not in (None, present):
                raise RequestError(f"{flag} is {present} for as long as this server runs; leave it out, or restart it.")


def _extra(text: str | None) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"hicache_storage_backend_extra_config_json is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RequestError("hicache_storage_backend_extra_config_json must be a JSON object.")
    return found
