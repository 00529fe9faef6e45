"""The bootstrap server of prefill instances: where decode instances ask for them.

Several prefill servers of one host may name one port: the first to come serves it for all, the others register with
it, and when it ends one of them takes over. It answers before the model is loaded, since transfer engines may look for
their metadata here (`/metadata` as in Mooncake's own server).
"""

from __future__ import annotations

import hmac
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route as Path

from moonlang.base import log
from moonlang.base.clock import monotonic_ns
from moonlang.base.errors import ConfigError, PeerError, RequestError
from moonlang.config.server_args import ServerArgs
from moonlang.disaggregation import bootstrap
from moonlang.disaggregation.connection import Address
from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.disaggregation.registry import Registry, Route
from moonlang.entrypoints.exchange import read_body
from moonlang.entrypoints.front import BACKLOG, dialled

REPEAT_S = 1.0
START_S = 10.0
_ANY = "-1"
_OURS = "MoonLang bootstrap"

_log = log.get(__name__)


class BootstrapRoutes:
    """HTTP over a Registry."""

    def __init__(self, registry: Registry, token: str) -> None:
        self._registry = registry
        self._token = token

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Path("/health", self._health),
                Path("/route", self._get_route, methods=["GET"]),
                Path("/route", self._put_route, methods=["PUT"]),
                Path("/route", self._delete_route, methods=["DELETE"]),
                Path("/register_dp_rank", self._put_room, methods=["POST"]),
                Path("/query_dp_ranks", self._get_rooms, methods=["POST"]),
                Path("/metadata", self._metadata, methods=["GET", "PUT", "DELETE"]),
            ],
            exception_handlers={RequestError: _refused},
        )

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("OK", headers={"server": _OURS})

    async def _get_route(self, request: Request) -> Response:
        names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
        values = [request.query_params.get(name, "") for name in names]
        if not all(value.lstrip("-").isdecimal() for value in values):
            return PlainTextResponse("Missing inputs for bootstrap server.", 400)
        if all(value == _ANY for value in values):
            found: dict[str, Any] | None = self._registry.overview(monotonic_ns())
            missing = PlainTextResponse("The prefill server is not fully registered yet.", 503)
        else:
            dp, cp, tp, pp = (int(value) for value in values)
            found = self._registry.rank((dp, cp, tp, pp), monotonic_ns())
            missing = PlainTextResponse("Bootstrap info not found.", 404)
        return missing if found is None else JSONResponse(found)

    async def _put_route(self, request: Request) -> Response:
        self._check(request)
        taken = self._registry.put(await _body(request, Route), monotonic_ns())
        return PlainTextResponse("OK") if taken else PlainTextResponse("Too many instances.", 507)

    async def _delete_route(self, request: Request) -> Response:
        self._check(request)
        self._registry.withdraw((await _body(request, _Gone)).instance)
        return PlainTextResponse("OK")

    async def _put_room(self, request: Request) -> Response:
        self._check(request)
        room = await _body(request, _Room)
        self._registry.put_room(room.bootstrap_room, room.dp_rank, monotonic_ns())
        return PlainTextResponse("OK")

    async def _get_rooms(self, request: Request) -> Response:
        return JSONResponse(self._registry.dp_ranks((await _body(request, _Rooms)).bootstrap_rooms))

    async def _metadata(self, request: Request) -> Response:
        key = request.query_params.get("key", "")
        if request.method == "PUT":
            if self._registry.put_metadata(key, await read_body(request)):
                return PlainTextResponse("metadata updated")
            return PlainTextResponse("too much metadata", 507)
        if request.method == "DELETE":
            if self._registry.drop_metadata(key):
                return PlainTextResponse("metadata deleted")
            return PlainTextResponse("metadata not found", 404)
        value = self._registry.metadata(key)
        return PlainTextResponse("metadata not found", 404) if value is None else Response(value)

    def _check(self, request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if self._token and not hmac.compare_digest(sent.encode(), f"Bearer {self._token}".encode()):
            raise RequestError(f"Another cluster token ({TOKEN_VARIABLE}).", status=401)


class _Gone(msgspec.Struct, frozen=True):
    instance: str


class _Room(msgspec.Struct, frozen=True):
    bootstrap_room: int
    dp_rank: int


class _Rooms(msgspec.Struct, frozen=True):
    bootstrap_rooms: list[int]


async def _body(request: Request, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(await read_body(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The request body is not valid: {error}.") from None


def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 500
    return PlainTextResponse(str(error), status)


def open_bootstrap(args: ServerArgs) -> BootstrapHost | None:
    """The share of a prefill instance in its bootstrap server; None for other servers. To be opened before the roles
    start: their transfer engine may look for its metadata there."""
    return BootstrapHost(args) if args.disaggregation_mode == "prefill" else None


class BootstrapHost:
    """This process's share in the bootstrap server of its host and port: serves it, or waits to take over.

    site: where it is. `announce` makes the prefill instance known and keeps it so, from a thread of its own.
    """

    def __init__(self, args: ServerArgs) -> None:
        """ConfigError when the port is taken by something else. Port 0 becomes a free one: see `site`."""
        self.site: Address = (args.host, args.disaggregation_bootstrap_port)
        self._args = args
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        self._stop = threading.Event()
        self._routes: list[dict[str, Any]] = []
        self._server: _Served | None = None
        self._keeper: threading.Thread | None = None
        if not self._serve() and not self._neighbour():
            host, port = self._local
            raise ConfigError(
                f"Port {port} of {host} is taken by something that is not a bootstrap server.",
                hint="Choose another --disaggregation-bootstrap-port.",
            )

    @property
    def _local(self) -> Address:
        """Where this process reaches it."""
        return dialled(self.site[0]), self.site[1]

    def announce(self, *links: Mapping[str, Any]) -> None:
        """Make the instance of each replica known; PeerError when that fails at first. links: instance, host and port,
        of their roles."""
        args = self._args
        self._routes = [
            {
                **link,
                "rank_ip": link["host"],
                "rank_port": link["port"],
                "system_dp_size": len(links),
                "system_dp_rank": replica,
                "page_size": args.page_size,
                "kv_cache_dtype": args.kv_cache_dtype,
                "load_balance_method": args.load_balance_method,
                "prefill_http_port": args.port,
            }
            for replica, link in enumerate(links)
        ]
        self._register()
        self._keeper = threading.Thread(target=self._keep, name="bootstrap-keeper", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._server is not None:
            self._server.close()
            return
        try:
            for route in self._routes:
                bootstrap.withdraw(self._local, route["instance"], self._token)
        except PeerError as error:
            _log.info("%s", error)

    def _register(self) -> None:
        for route in self._routes:
            bootstrap.register(self._local, route, self._token)

    def _keep(self) -> None:
        while not self._stop.wait(REPEAT_S):
            try:
                self._register()
            except PeerError as error:
                if self._server is None and self._serve():
                    _log.info("Took over the bootstrap server on port %d.", self._local[1])
                else:
                    _log.warning("%s", error)

    def _serve(self) -> bool:
        """Try to serve the port; False when somebody does."""
        try:
            self._server = _Served(self.site, self._token)
        except OSError:
            return False
        self.site = (self.site[0], self._server.port)
        return True

    def _neighbour(self) -> bool:
        """Whether the one who serves the port is a bootstrap server."""
        try:
            bootstrap.instances(self._local)
        except PeerError:
            return False
        return True


class _Served:
    """A bootstrap server on a thread. OSError when the port is taken."""

    def __init__(self, site: Address, token: str) -> None:
        self._listener = _listener(site)
        self.port: int = self._listener.getsockname()[1]
        app = BootstrapRoutes(Registry(), token).app()
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, backlog=BACKLOG
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, name="bootstrap", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


def _listener(site: Address) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        site[0] or None, site[1], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
