"""The middleware every request passes: keys, content type, HTTP metrics. Pure ASGI: nothing is added per chunk."""

from __future__ import annotations

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moonlang.base.errors import RequestError
from moonlang.entrypoints import errors
from moonlang.entrypoints.exchange import json_response
from moonlang.observability.metrics import ServerMetrics

_OPEN_PREFIXES = ("/health", "/ready", "/metrics")  # probes and scrapers carry no keys
_OTHER = "other"  # label of paths that are not routes: clients must not be able to invent labels
_MEDIA_ERROR = "Unsupported Media Type: Only 'application/json' is allowed"


class Gate:
    """Wraps the application of one server.

    api_key opens everything but the `management` paths when there is an admin_api_key; that one opens everything.
    open_paths: those that need no key, beside probes. routes: the paths that get a label of their own in metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        admin_api_key: str | None,
        management: frozenset[str],
        open_paths: frozenset[str],
        metrics: ServerMetrics | None,
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_api_key = admin_api_key
        self._management = management
        self._open_paths = open_paths
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app = self._refusal(scope) or self._app
        if self._metrics is None:
            await app(scope, receive, send)
        else:
            await self._counted(self._metrics, app, scope, receive, send)

    async def _counted(self, metrics: ServerMetrics, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = scope["path"] if scope["path"] in self._routes else _OTHER
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.http_started(endpoint, scope["method"])
        try:
            await app(scope, receive, noting)
        finally:
            metrics.http_ended(endpoint, scope["method"], status)

    def _refusal(self, scope: Scope) -> Response | None:
        path, method = scope["path"], scope["method"]
        if method == "OPTIONS" or path in self._open_paths or path.startswith(_OPEN_PREFIXES):
            return None
        headers = scope["headers"]
        if not self._admitted(path, headers):
            return json_response({"error": "Unauthorized"}, 401, {"www-authenticate": "Bearer"})
        if method == "POST" and path.startswith("/v1/"):
            media = _header(headers, b"content-type").split(b";", 1)[0].strip().lower()
            if media != b"application/json":
                return json_response(errors.openai(RequestError(_MEDIA_ERROR)), 400)
        return None

    def _admitted(self, path: str, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._admin_api_key is not None and path in self._management:
            keys = [self._admin_api_key]
        elif self._api_key is not None:
            keys = [key for key in (self._api_key, self._admin_api_key) if key is not None]
        else:
            return True
        sent = _header(headers, b"authorization")
        return any(hmac.compare_digest(sent, b"Bearer " + key.encode()) for key in keys)


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of a header; names come in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return b""
