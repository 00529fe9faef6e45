"""The ASGI application of one server: routes and middleware put together. New groups of routes are added here."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from moonlang.entrypoints import admin, cache_routes
from moonlang.entrypoints.admin import AdminRoutes
from moonlang.entrypoints.cache_routes import CacheRoutes
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.gate import Gate
from moonlang.entrypoints.health import Health
from moonlang.entrypoints.native import NativeRoutes
from moonlang.entrypoints.openai.chat import ChatRoutes
from moonlang.entrypoints.openai.completions import CompletionRoutes
from moonlang.entrypoints.openai.models import ModelRoutes
from moonlang.entrypoints.openai.tokens import TokenRoutes
from moonlang.entrypoints.ui.server import UiRoutes
from moonlang.entrypoints.ui.site import TREE, Site
from moonlang.text.chat_template import ChatTemplate
from moonlang.version import __version__


def build_app(client: EngineClient, template: ChatTemplate, health: Health) -> FastAPI:
    """The application."""
    app = FastAPI(title="MoonLang", version=__version__, root_path=client.args.fastapi_root_path)
    pages = Site()
    routers = (
        NativeRoutes(client).router(),
        ChatRoutes(client, template).router(),
        CompletionRoutes(client).router(),
        ModelRoutes(client).router(),
        TokenRoutes(client, template).router(),
        AdminRoutes(client, health).router(),
        CacheRoutes(client).router(),
        UiRoutes(client).router(),
        pages.router(),
    )
    for router in routers:
        app.include_router(router)
    app.add_middleware(
        Gate,
        api_key=client.args.api_key,
        admin_api_key=client.args.admin_api_key,
        management=admin.MANAGEMENT | cache_routes.MANAGEMENT | {TREE},
        open_paths=pages.open_paths,
        metrics=client.metrics,
        routes=frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute)),
    )
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    return app
