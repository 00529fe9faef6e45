"""The files of the page at /ui, as they are: no build step, nothing from another host.

The files are open, so that the page can ask for a key; what they fetch (`DATA`) wants one as every other route does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.entrypoints.exchange import json_response

PAGE = "/ui"
STATE = "/ui/state"
TREE = "/ui/tree"
FOLDER = Path(__file__).parent / "static"
DEFAULT_NODES, MOST_NODES = 500, 10_000

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind} 'self'" for kind in ("script-src", "style-src", "img-src", "connect-src")),
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",  # asked for again each time, and answered with 304
    }
)


class Site:
    """The static files, read once. `open_paths`: their paths, which need no key."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for file in sorted(FOLDER.iterdir()):
            body = file.read_bytes()
            path = PAGE if file.name == "index.html" else f"{PAGE}/{file.name}"
            tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            self._files[path] = body, _TYPES[file.suffix], tag

    @property
    def open_paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["ui"])
        for path in self._files:
            router.add_api_route(path, self.file, methods=["GET"], response_model=None, include_in_schema=path == PAGE)
        return router

    async def file(self, request: Request) -> Response:
        """One of the files; 304 when the browser has it."""
        body, kind, tag = self._files[request.scope["route"].path]
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=kind)


def refuse_strangers(request: Request) -> None:
    """RequestError 403 when a page of another host asks: a browser lends it the user's way into this network."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
        origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    ):
        raise RequestError("Only the page of this server may ask for this.", status=403)


def nodes_wanted(request: Request) -> int:
    """?nodes= of a request for the tree. RequestError 400 when it makes no sense."""
    text = request.query_params.get("nodes", str(DEFAULT_NODES))
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST_NODES:
        raise RequestError(f"nodes must be in [1, {MOST_NODES}], got {text!r:.64}.")
    return int(text)


def answer(body: Any, status: int = 200) -> Response:
    """Data for the page alone."""
    return json_response(body, status, {"cache-control": "no-store", "x-content-type-options": "nosniff"})
