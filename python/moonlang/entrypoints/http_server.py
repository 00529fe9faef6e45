"""The HTTP server process: starts the roles, serves until told to stop or a role dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket

import uvicorn

from moonlang.base import log
from moonlang.base.errors import PeerError, RequestError
from moonlang.config.model_config import ModelConfig
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints import front, generation, pairing
from moonlang.entrypoints.app import build_app
from moonlang.entrypoints.bootstrap import open_bootstrap
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.describe import served_name
from moonlang.entrypoints.health import Health
from moonlang.observability import buckets
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import RequestLog
from moonlang.roles.exits import describe
from moonlang.roles.supervisor import Cluster
from moonlang.text.chat_template import ChatTemplate
from moonlang.text.tokenizer import load_tokenizer

_log = log.get(__name__)

DRAIN_S = 30  # how long requests may still run after SIGTERM
LAST_WORDS_S = 0.3  # what a dead engine's clients get to read their error
WARM_UP = {"text": "The capital city of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
WARM_UP_IDS = {"input_ids": [0, 1, 2], "sampling_params": WARM_UP["sampling_params"]}  # without a tokenizer


def serve(args: ServerArgs) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. ConfigError when the configuration cannot work."""
    log.configure("server", args.log_level)
    with front.stopped_by_signals(), front.listening(args.host, args.port) as listener:
        prepared = prepare(args)
        if args.node_rank > 0:
            return _follow(prepared)
        # First of all: the transfer engine may look for its metadata there while the roles load the model.
        bootstrap = open_bootstrap(prepared.args)
        cluster = Cluster(prepared.args, prepared.model)
        try:
            server = _server(prepared.args, prepared.model, cluster)  # while the roles load the model
            cluster.wait_ready()
            if bootstrap is not None:
                bootstrap.announce(cluster.ready["scheduler"]["link"])
            server.run(sockets=[listener])
            return server.exit_status
        except PeerError as error:
            _log.error("The server cannot start. %s", error)
            return 1
        finally:
            if bootstrap is not None:
                bootstrap.close()
            cluster.close()


def _follow(prepared: Prepared) -> int:
    """A node that only lends its ranks: the first one answers requests."""
    cluster = Cluster(prepared.args, prepared.model)
    try:
        cluster.wait_ready()
        _log.info("Node %d of %d is ready.", prepared.args.node_rank, prepared.args.nnodes)
        cluster.wait_end()
    except PeerError as error:
        _log.error("This node cannot start. %s", error)
    finally:
        cluster.close()
    return 1


def _server(args: ServerArgs, model: ModelConfig, cluster: Cluster) -> _Server:
    client = _client(args, model, cluster)
    health = Health.from_environment(client)
    folder = args.tokenizer_path or model.path
    special = client.tokenizer.special_tokens if client.tokenizer is not None else {}
    template = ChatTemplate(folder, args.chat_template, name=args.hf_chat_template_name, special_tokens=special)
    app = build_app(client, template, health)
    front.configure_logs(_http_level(args), args.uvicorn_access_log_exclude_prefixes)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=_http_level(args) <= logging.INFO,
        server_header=False,
        backlog=front.BACKLOG,
        timeout_graceful_shutdown=DRAIN_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_keyfile_password=args.ssl_keyfile_password,
    )
    return _Server(config, client, health, cluster)


def _client(args: ServerArgs, model: ModelConfig, cluster: Cluster) -> EngineClient:
    tokenizer = None
    if not args.skip_tokenizer_init:
        tokenizer = load_tokenizer(args.tokenizer_path or model.path, args.trust_remote_code, args.tokenizer_mode)
    request_log = None
    if args.log_requests or args.enable_request_time_stats_logging:
        level = args.log_requests_level if args.log_requests else None
        request_log = RequestLog(_log, level, args.log_requests_format, times=args.enable_request_time_stats_logging)
    metrics = _metrics(args, model) if args.enable_metrics else None
    return EngineClient(
        cluster.endpoint, tokenizer, model, args, cluster.ready, metrics=metrics, request_log=request_log
    )


def _metrics(args: ServerArgs, model: ModelConfig) -> ServerMetrics:
    return ServerMetrics(
        served_name(args, model),
        engine_type="unified" if args.disaggregation_mode == "null" else args.disaggregation_mode,
        extra={name: str(value) for name, value in (args.extra_metric_labels or {}).items()},
        ttft_s=buckets.seconds(args.bucket_time_to_first_token, buckets.TIME_TO_FIRST_TOKEN_S),
        inter_token_s=buckets.seconds(args.bucket_inter_token_latency, buckets.INTER_TOKEN_S),
        e2e_s=buckets.seconds(args.bucket_e2e_request_latency, buckets.END_TO_END_S),
    )


class _Server(front.Server):
    """A front with our beginning and end: warm-up before the port opens, an early end when a role dies."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, health: Health, cluster: Cluster) -> None:
        super().__init__(config)
        self._client = client
        self._health = health
        self._cluster = cluster
        self.exit_status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._client.start(loop)

        def on_death(role: str, status: int, lines: tuple[str, ...]) -> None:  # its last lines are in the log already
            with contextlib.suppress(RuntimeError):  # the loop has ended already, and everything with it
                loop.call_soon_threadsafe(self._role_died, role, status)

        self._cluster.on_death(on_death)
        if not self._client.args.skip_server_warmup:
            await self._warm_up()
        if self.should_exit:
            return
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process: later collections need not look at it
        await super().startup(sockets)
        self._health.state = "Up"
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("Listening on %s:%d", host, port)
        _log.info("The server is fired up and ready to roll!")

    async def _warm_up(self) -> None:
        body = WARM_UP if self._client.tokenizer is not None else WARM_UP_IDS
        if self._client.args.disaggregation_mode != "null":
            body = body | {"bootstrap_host": pairing.ALONE, "bootstrap_room": 0}
        try:
            await generation.generate(self._client, body)
        except RequestError as error:
            if not self._client.failure:
                _log.warning("The warm-up request was refused: %s", error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._health.state = "Exiting"
        _log.info("Shutting down; %d sequences may still finish, within %d s", self._client.live_count, DRAIN_S)
        await super().shutdown(sockets)
        self._client.close()

    def _role_died(self, role: str, status: int) -> None:
        self._client.fail(f"The {role} {describe(status)}.")
        self.exit_status = 1
        self.should_exit = True
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._hurry)

    def _hurry(self) -> None:
        self.force_exit = True


def _http_level(args: ServerArgs) -> int:
    return logging.getLevelNamesMapping()[(args.log_level_http or args.log_level).upper()]
