"""The ASGI application of a router: its routes, and the key that opens them."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import aiohttp
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moonlang.router import errors
from moonlang.router.admin import AdminRoutes
from moonlang.router.args import RouterArgs
from moonlang.router.attempt import Attempts
from moonlang.router.dispatch import Dispatcher
from moonlang.router.health import Watch
from moonlang.router.metrics import RouterMetrics
from moonlang.router.relay import Relay
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
    app.include_router(AdminRoutes(parts.workers, parts.watch, parts.session, metrics).router())
    dispatcher = Dispatcher(parts.workers, Attempts(parts.session, metrics), args, metrics)
    limits = {"max_body_bytes": args.max_payload_size, "max_active": args.max_concurrent_requests}
    generation = Relay(dispatcher, metrics, generates=True, **limits)
    questions = Relay(dispatcher, metrics, generates=False, **limits)
    whole = _NotByPairs() if parts.workers.pairs else generation
    for table, endpoint in ((GENERATION, generation), (QUESTIONS, questions), (WHOLE_SERVERS, whole)):
        for method, paths in table.items():
            app.router.routes += [Route(path, endpoint, methods=[method]) for path in paths]
    if args.api_key:
        app.add_middleware(KeyCheck, key=args.api_key)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    return app


class KeyCheck:
    """Lets pass who knows the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._wanted = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not scope["path"].startswith(_OPEN_PREFIXES):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, self._wanted):
                app = errors.reply(401, "unauthorized", "The API key is missing or wrong.")
        await app(scope, receive, send)


class _NotByPairs:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"{scope['path']} is not served by prefill and decode servers."
        await errors.reply(501, "not_implemented", text)(scope, receive, send)
