"""What the router itself answers when it cannot pass a request on, in the shape of OpenAI's errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from moonlang.base.errors import PeerError, RequestError

# Codes by status, for what is refused before a worker is chosen.
_CODES = {400: "bad_request", 401: "unauthorized", 413: "payload_too_large", 429: "too_many_requests"}
_TITLES = {499: "Client Closed Request"}  # that HTTPStatus does not know
NO_WORKER = "server_selection_failed"
FAILED = "worker_failed"
RETRY_AFTER_S = 1


class RefusedError(PeerError):
    """A worker's host is there, and nobody listens on its port."""


class NoWorkerError(RequestError):
    """There is nobody to send a request to."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, hint="Try again soon.")


def shape(status: int, code: str, message: str) -> dict[str, Any]:
    """The body of an error."""
    title = _TITLES.get(status) or HTTPStatus(status).phrase
    return {"error": {"message": message, "type": title, "param": None, "code": code}}


def response(error: RequestError | PeerError) -> Response:
    """The answer to a request that has got no byte of another one."""
    if isinstance(error, PeerError):
        return reply(503, FAILED, str(error))
    code = NO_WORKER if isinstance(error, NoWorkerError) else _CODES.get(error.status, "router_error")
    return reply(error.status, code, str(error))


def reply(status: int, code: str, message: str) -> Response:
    """An error as a response; one that will pass says when to come back."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return Response(msgspec.json.encode(shape(status, code, message)), status, headers, "application/json")


def last_event(error: PeerError) -> bytes:
    """How a stream ends that has lost its worker. It begins with a blank line: an event may have been cut in two."""
    body = {"error": {**shape(503, FAILED, str(error))["error"], "retryable": True}}
    return b"\n\ndata: " + msgspec.json.encode(body) + b"\n\ndata: [DONE]\n\n"
