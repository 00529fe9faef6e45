"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from moonlang.base import clock
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.describe import served_name
from moonlang.entrypoints.exchange import json_response


class ModelRoutes:
    """The list of served models: one."""

    def __init__(self, client: EngineClient) -> None:
        name = served_name(client.args, client.model)
        self._card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": int(clock.wall_s()),
            "owned_by": "sglang",
            "root": name,
            "parent": None,
            "max_model_len": client.model.context_length,
        }

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        router.add_api_route("/v1/models", self.list, methods=["GET"], response_model=None)
        router.add_api_route("/v1/models/{name:path}", self.show, methods=["GET"], response_model=None)
        return router

    async def list(self) -> Response:
        """The served model."""
        return json_response({"object": "list", "data": [self._card]})

    async def show(self, name: str) -> Response:
        """The served model, by its name."""
        if name == self._card["id"]:
            return json_response(self._card)
        error = {
            "message": f"The model {name[:256]!r} does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return json_response({"error": error}, 404)
