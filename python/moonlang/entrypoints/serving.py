"""What every process that answers HTTP requests of a server is made of: client, routes, uvicorn's settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import uvicorn

from moonlang.base import log
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.ports import Endpoint
from moonlang.entrypoints import front
from moonlang.entrypoints.app import build_app
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.describe import served_name
from moonlang.entrypoints.dispatch import Board
from moonlang.entrypoints.health import Health
from moonlang.observability import buckets
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import RequestLog
from moonlang.text.chat_template import ChatTemplate
from moonlang.text.tokenizer import load_tokenizer

DRAIN_S = 30  # how long requests may still run after SIGTERM
LAST_WORDS_S = 0.3  # what a dead engine's clients get to read their error

_log = log.get("moonlang.entrypoints.http_server")


@dataclass(frozen=True, slots=True)
class Serving:
    """One front, ready to be run by uvicorn."""

    client: EngineClient
    health: Health
    config: uvicorn.Config


def build(
    args: ServerArgs,
    model: ModelConfig,
    endpoint: Endpoint,
    ready: dict[str, Any],
    *,
    number: int = 0,
    board: Board | None = None,
) -> Serving:
    """Load the tokenizer and put the front together. endpoint: its mailbox; ready: what the roles have reported, which
    may be filled later; number: which of several fronts it is; board: what all have sent. ConfigError when the
    tokenizer or a template cannot be read."""
    client = _client(args, model, endpoint, ready, number, board)
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
        timeout_keep_alive=front.KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_keyfile_password=args.ssl_keyfile_password,
    )
    return Serving(client, health, config)


def _client(
    args: ServerArgs, model: ModelConfig, endpoint: Endpoint, ready: dict[str, Any], number: int, board: Board | None
) -> EngineClient:
    tokenizer = None
    if not args.skip_tokenizer_init:
        tokenizer = load_tokenizer(args.tokenizer_path or model.path, args.trust_remote_code, args.tokenizer_mode)
    request_log = None
    if args.log_requests or args.enable_request_time_stats_logging:
        level = args.log_requests_level if args.log_requests else None
        request_log = RequestLog(_log, level, args.log_requests_format, times=args.enable_request_time_stats_logging)
    metrics = _metrics(args, model) if args.enable_metrics else None
    return EngineClient(
        endpoint, tokenizer, model, args, ready, metrics=metrics, request_log=request_log, front=number, board=board
    )


def _metrics(args: ServerArgs, model: ModelConfig) -> ServerMetrics:
    return ServerMetrics(
        served_name(args, model),
        engine_type="unified" if args.disaggregation_mode == "null" else args.disaggregation_mode,
        extra={name: str(value) for name, value in (args.extra_metric_labels or {}).items()},
        replicas=args.dp_size,
        ttft_s=buckets.seconds(args.bucket_time_to_first_token, buckets.TIME_TO_FIRST_TOKEN_S),
        inter_token_s=buckets.seconds(args.bucket_inter_token_latency, buckets.INTER_TOKEN_S),
        e2e_s=buckets.seconds(args.bucket_e2e_request_latency, buckets.END_TO_END_S),
    )


def _http_level(args: ServerArgs) -> int:
    return logging.getLevelNamesMapping()[(args.log_level_http or args.log_level).upper()]
