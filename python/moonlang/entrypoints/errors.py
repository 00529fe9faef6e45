"""Error bodies. The families of routes have always answered in different shapes, and clients read them."""

from __future__ import annotations

from typing import Any

from moonlang.base.errors import RequestError
from moonlang.core.request import Finish

_UNAVAILABLE = 503  # a queue is full, or somebody is gone: the same request may do better next time
CLIENT_ABORT = 499  # the request's own client asked for the end: an answer, not an error

_TITLES = {400: "BadRequestError", 404: "NotFoundError", 413: "PayloadTooLargeError", 499: "ClientClosedRequest"}


def native(error: RequestError) -> dict[str, Any]:
    """Body for /generate and the management routes."""
    if error.status in (400, 413):
        return {"error": {"message": str(error)}}
    return engine(error)


def openai(error: RequestError) -> dict[str, Any]:
    """Body for the /v1 routes."""
    if error.status not in _TITLES:
        return engine(error)
    title = _TITLES[error.status]
    return {"object": "error", "message": str(error), "type": title, "param": None, "code": error.status}


def engine(error: RequestError) -> dict[str, Any]:
    """Body for refusals that come from behind the HTTP layer: queue full, time over, engine gone."""
    return {"object": "error", "message": str(error), "type": str(error.status), "param": None, "code": error.status}


def in_stream(error: RequestError) -> dict[str, Any]:
    """What a stream that has begun says instead of its next chunk."""
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if error.status == 400 else str(error.status),
            "code": error.status,
            "retryable": error.status == _UNAVAILABLE,
        }
    }


def of_finish(finish: Finish | None) -> RequestError | None:
    """The error that an end stands for: None unless the engine refused or lost the request."""
    if finish is None or finish.kind != "abort" or finish.status in (0, CLIENT_ABORT):
        return None
    return RequestError(finish.message or "The request was aborted.", status=finish.status)
