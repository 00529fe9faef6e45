"""What the routes of the OpenAI dialect share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from moonlang.base import clock
from moonlang.base.errors import RequestError
from moonlang.core.sampling_parse import model_defaults
from moonlang.entrypoints import errors
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.describe import served_name
from moonlang.entrypoints.exchange import json_response
from moonlang.entrypoints.openai.protocol import ChatRequest, CompletionRequest, StreamOptions


def sampling_defaults(client: EngineClient) -> dict[str, Any]:
    """What stands under a request's own sampling parameters."""
    found = model_defaults(client.model.generation) if client.args.sampling_defaults == "model" else {}
    return {**found, **(client.args.preferred_sampling_params or {})}


def refused(error: RequestError) -> Response:
    """The answer to a call that fails before its first byte."""
    return json_response(errors.openai(error), error.status)


class Envelope:
    """The fields that every answer and chunk of one call begins with."""

    def __init__(self, client: EngineClient, body: ChatRequest | CompletionRequest, rid: str, kind: str) -> None:
        self._fields = {
            "id": rid,
            "object": kind,
            "created": int(clock.wall_s()),
            "model": body.model or served_name(client.args, client.model),
        }
        self._metadata = {"weight_version": client.args.weight_version}

    def answer(self, choices: list[dict[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._fields, "choices": choices, "usage": usage, "metadata": self._metadata}

    def chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**self._fields, "choices": choices, "usage": usage}


def wants_usage(client: EngineClient, options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether a stream ends with a usage chunk, and whether every chunk carries usage."""
    default = client.args.stream_response_default_include_usage
    if options is None:
        return default, False
    at_end = default if options.include_usage is None else options.include_usage
    return at_end, bool(options.continuous_usage_stats)
