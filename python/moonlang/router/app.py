"""The ASGI application of a router: its routes, and the key that opens them."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

import aiohttp
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.entrypoints.ui.site import Site
from moonlang.router import errors
from moonlang.router.admin import AdminRoutes
from moonlang.router.args import RouterArgs
from moonlang.router.attempt import Attempts
from moonlang.router.dispatch import Dispatcher
from moonlang.router.health import Watch
from moonlang.router.metrics import RouterMetrics
from moonlang.router.relay import Relay
from moonlang.router.ui import UiRoutes
from moonlang.router.workers import WorkerSet
from moonlang.version import __version__

# By a server that works alone, or by a pair.
GENERATION = {"POST": ("/generate", "/v1/chat/completions", "/v1/completions"), "PUT": ("/generate",)}
# By one server of any kind.
QUESTIONS = {
    "GET": ("/v1/models", "/v1/models/{name:path}", "/model_info", "/get_model_info"),
    "POST": ("/v1/tokenize", "/tokenize", "/v1/detokenize", "/detokenize"),
}
# By servers that work alone only.
WHOLE_SERVERS = {
    "POST": (
        *("/v1/embeddings", "/v1/classify", "/v1/score", "/v1/rerank", "/v1/responses", "/v1/messages"),
        *("/encode", "/classify"),
    )
}
TOKEN_HEADER = b"x-moonlang-cluster-token"
_OPEN_PREFIXES = ("/health", "/liveness", "/readiness", "/ready", "/metrics")  # probes and scrapers carry no keys


@dataclass(frozen=True, slots=True)
class Parts:
    """What a router is made of."""

    args: RouterArgs
    workers: WorkerSet
    session: aiohttp.ClientSession
    watch: Watch
    metrics: RouterMetrics


def build_app(parts: Parts) -> FastAPI:
    """The application."""
    args, metrics = parts.args, parts.metrics
    app = FastAPI(title="MoonLang router", version=__version__)
    dispatcher = Dispatcher(parts.workers, Attempts(parts.session, metrics), args, metrics)
    limits = {"max_body_bytes": args.max_payload_size, "max_active": args.max_concurrent_requests}
    generation = Relay(dispatcher, metrics, generates=True, **limits)
    questions = Relay(dispatcher, metrics, generates=False, **limits)
    whole = _NotByPairs() if parts.workers.pairs else generation
    for table, endpoint in ((GENERATION, generation), (QUESTIONS, questions), (WHOLE_SERVERS, whole)):
        for method, paths in table.items():
            app.router.routes += [Route(path, endpoint, methods=[method]) for path in paths]
    admin = AdminRoutes(parts.workers, parts.watch, parts.session, metrics, args.cluster_card)
    app.include_router(admin.router())  # last: rarely asked
    pages = Site()
    app.include_router(UiRoutes(parts.workers, parts.session, metrics).router())
    app.include_router(pages.router())
    token = os.environ.get(TOKEN_VARIABLE, "")
    if args.api_key or token:
        app.add_middleware(KeyCheck, key=args.api_key or "", token=token, open_paths=pages.open_paths)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    return app


class KeyCheck:
    """Lets pass who knows the key, "" being none. Who knows the cluster's token may change the set of workers and learn
    how to join; where there is a token, nobody else may."""

    def __init__(self, app: ASGIApp, key: str, token: str = "", open_paths: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._key = b"Bearer " + key.encode() if key else b""
        self._token = token.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lacking = self._lacking(scope) if scope["type"] == "http" and scope["method"] != "OPTIONS" else ""
        app = errors.reply(401, "unauthorized", f"The {lacking} is missing or wrong.") if lacking else self._app
        await app(scope, receive, send)

    def _lacking(self, scope: Scope) -> str:
        """What the client of a request should have sent; "" when it may pass."""
        path, headers = scope["path"], dict(scope["headers"])
        if self._token and (path == "/cluster" or path.startswith("/workers")):
            if hmac.compare_digest(headers.get(TOKEN_HEADER, b""), self._token):
                return ""
            if path == "/cluster" or scope["method"] != "GET":
                return "cluster token"
        if not self._key or path in self._open_paths or path.startswith(_OPEN_PREFIXES):
            return ""
        return "" if hmac.compare_digest(headers.get(b"authorization", b""), self._key) else "API key"


class _NotByPairs:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"{scope['path']} is not served by prefill and decode servers."
        await errors.reply(501, "not_implemented", text)(scope, receive, send)
