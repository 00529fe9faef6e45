"""The router's process: takes its workers from the flags and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
import uvloop

from moonlang.base import clock, log, notify
from moonlang.entrypoints import front
from moonlang.router.app import Parts, build_app
from moonlang.router.args import RouterArgs
from moonlang.router.breaker import BreakerLimits
from moonlang.router.health import Checks, Watch
from moonlang.router.metrics import RouterMetrics
from moonlang.router.upstream import new_session
from moonlang.router.workers import HealthLimits, WorkerSet

_log = log.get(__name__)


def serve(args: RouterArgs, given: socket.socket | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. ConfigError when the configuration cannot work.

    given: a socket that listens already, in place of --host and --port.
    """
    log.configure("router", args.log_level)
    front.raise_open_files()
    with front.stopped_by_signals(), given or front.listening(args.host, args.port) as listener:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(args, listener))
        return 0


async def _serve(args: RouterArgs, listener: socket.socket) -> None:
    async with assembled(args) as parts:
        level = logging.getLevelNamesMapping()[args.log_level.upper()]
        front.configure_logs(level)
        config = uvicorn.Config(
            build_app(parts),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=level <= logging.DEBUG,
            server_header=False,
            backlog=front.BACKLOG,
            timeout_keep_alive=front.KEEP_ALIVE_S,
            timeout_graceful_shutdown=args.shutdown_grace_period_secs,
        )
        await _Server(config).serve([listener])


@asynccontextmanager
async def assembled(args: RouterArgs) -> AsyncIterator[Parts]:
    """The parts of a router, its workers being watched. ConfigError when a worker is named twice."""
    workers = WorkerSet(
        pairs=args.pairs,
        health=HealthLimits(failures=args.health_failure_threshold, successes=args.health_success_threshold),
        breaker=BreakerLimits(
            failures=0 if args.disable_circuit_breaker else args.cb_failure_threshold,
            successes=args.cb_success_threshold,
            open_ns=int(args.cb_timeout_duration_secs * clock.NS_PER_S),
            window_ns=int(args.cb_window_duration_secs * clock.NS_PER_S),
        ),
        max_index_chars=args.max_tree_size,
    )
    checks = Checks(
        interval_s=args.health_check_interval_secs,
        timeout_s=args.health_check_timeout_secs,
        path=args.health_check_endpoint,
        headers={"authorization": f"Bearer {args.api_key}"} if args.api_key else {},
    )
    async with new_session() as session:
        watch = Watch(workers, session, checks)
        try:
            for url in args.worker_urls:
                watch.start(workers.add(url, "regular"))
            for url, port in args.prefill:
                watch.start(workers.add(url, "prefill", port))
            for url in args.decode:
                watch.start(workers.add(url, "decode"))
            yield Parts(args, workers, session, watch, RouterMetrics(workers))
        finally:
            await watch.close()


class _Server(front.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("Listening on %s:%d", host, port)
        notify.ready()
        _log.info("The router is ready; its workers are announced as they come up")
