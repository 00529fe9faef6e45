"""The HTTP server process: starts the roles, serves until told to stop or a role dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import socket

from moonlang.base import log, notify
from moonlang.base.errors import PeerError, RequestError
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints import front, generation, pairing, serving
from moonlang.entrypoints.bootstrap import open_bootstrap
from moonlang.entrypoints.serving import DRAIN_S, LAST_WORDS_S, Serving
from moonlang.roles import topology
from moonlang.roles.exits import describe
from moonlang.roles.supervisor import Cluster

_log = log.get(__name__)

_OPEN_S = 60  # what the other fronts get to begin to listen
_LOOK_S = 0.1  # so often a second signal is looked for
WARM_UP = {"text": "The capital city of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
WARM_UP_IDS = {"input_ids": [0, 1, 2], "sampling_params": WARM_UP["sampling_params"]}  # without a tokenizer


def serve(args: ServerArgs) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. ConfigError when the configuration cannot work."""
    log.configure("server", args.log_level)
    bound = front.listening if args.tokenizer_worker_num == 1 else front.first_sharing
    with front.stopped_by_signals(), bound(args.host, args.port) as listener:
        prepared = prepare(args)
        if args.node_rank > 0:
            return _follow(prepared)
        found = dataclasses.replace(prepared.args, port=listener.getsockname()[1])
        # First of all: the transfer engine may look for its metadata there while the roles load the model.
        bootstrap = open_bootstrap(found)
        if bootstrap is not None:
            found = dataclasses.replace(found, disaggregation_bootstrap_port=bootstrap.site[1])
        notify.doing("starting")
        cluster = Cluster(found, prepared.model)
        try:
            # While the roles load the model:
            made = serving.build(found, prepared.model, cluster.endpoint, cluster.ready, board=cluster.load_board())
            server = _Server(made, cluster)
            cluster.wait_ready()
            if bootstrap is not None:
                bootstrap.announce(*(cluster.ready[name]["link"] for name in topology.schedulers(prepared.args)))
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


class _Server(front.Server):
    """The first front: warm-up before the port opens, an early end when a role dies. The other fronts follow it."""

    def __init__(self, made: Serving, cluster: Cluster) -> None:
        super().__init__(made.config)
        self._client = made.client
        self._health = made.health
        self._cluster = cluster
        self.exit_status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._client.start(loop)

        def on_death(role: str, status: int, lines: tuple[str, ...]) -> None:  # its last lines are in the log already
            with contextlib.suppress(RuntimeError):  # the loop has ended already, and everything with it
                loop.call_soon_threadsafe(self._role_died, role, status)

        def on_loss(role: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._role_lost, role)

        self._cluster.on_death(on_death)
        self._cluster.on_loss(on_loss)
        if not self._client.args.skip_server_warmup:
            await self._warm_up()
        await self._open_others()
        if self.should_exit:
            return
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process: later collections need not look at it
        await super().startup(sockets)
        self._health.state = "Up"
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("Listening on %s:%d", host, port)
        args = self._client.args
        notify.ready(front.url(args.host, args.port, secure=args.ssl_certfile is not None))
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
        notify.stopping()
        _log.info("Shutting down; %d sequences may still finish, within %d s", self._client.live_count, DRAIN_S)
        drains = [asyncio.create_task(self._drain(name)) for name in self._client.other_fronts]
        await super().shutdown(sockets)
        while drains and not self.force_exit:
            drains = list((await asyncio.wait(drains, timeout=_LOOK_S))[1])
        self._client.close()

    async def _open_others(self) -> None:
        """Let the other fronts listen."""
        client = self._client
        said = {"ready": client.ready, "command": client.command}
        try:
            await asyncio.gather(*(client.ask(name, "open", said, _OPEN_S) for name in client.other_fronts))
        except RequestError as error:
            _log.error("The server cannot start. %s", error)
            self.exit_status = 1
            self.should_exit = True

    async def _drain(self, name: str) -> None:
        """Have another front finish what it has and take nothing new."""
        with contextlib.suppress(RequestError):  # it is gone, or has had its time
            await self._client.ask(name, "drain", timeout_s=DRAIN_S + LAST_WORDS_S)

    def _role_died(self, role: str, status: int) -> None:
        why = f"The {role} {describe(status)}."
        self._client.tell_fronts("fail", {"why": why})
        self._client.fail(why)
        self.exit_status = 1
        self.should_exit = True
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._hurry)

    def _role_lost(self, role: str) -> None:
        self._client.lose(role)
        self._client.tell_fronts("lose", {"role": role})

    def _hurry(self) -> None:
        self.force_exit = True
