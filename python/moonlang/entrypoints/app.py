"""The ASGI application of one server: routes and middleware put together. New groups of routes are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from moonlang.entrypoints.admin import MANAGEMENT, AdminRoutes
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.gate import Gate
from moonlang.entrypoints.health import Health
from moonlang.entrypoints.native import NativeRoutes
from moonlang.entrypoints.openai.chat import ChatRoutes
from moonlang.entrypoints.openai.completions import CompletionRoutes
from moonlang.entrypoints.openai.models import ModelRoutes
from moonlang.entrypoints.openai.tokens import TokenRoutes
from moonlang.text.chat_template import ChatTemplate
from moonlang.version import __version__


def build_app(client: EngineClient, template: ChatTemplate, health: Health) -> FastAPI:
    """The application."""
    app = FastAPI(title="MoonLang", version=__version__, root_path=client.args.fastapi_root_path)
    groups: tuple[Any, ...] = (
        NativeRoutes(client),
        ChatRoutes(client, template),
        CompletionRoutes(client),
        ModelRoutes(client),
        TokenRoutes(client, template),
        AdminRoutes(client, health),
    )
    for group in groups:
        app.include_router(group.router())
    app.add_middleware(
        Gate,
        api_key=client.args.api_key,
        admin_api_key=client.args.admin_api_key,
        management=MANAGEMENT,
        metrics=client.metrics,
        routes=frozenset(path for route in app.routes if (path := getattr(route, "path", ""))),
    )
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    return app
