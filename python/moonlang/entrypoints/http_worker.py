"""One of several processes that answer HTTP requests on one port, besides the one that the user started.

It has a tokenizer of its own and its own requests, and a listening socket to which the kernel deals its share of the
connections. The first front starts it, opens it when the engine is ready, and drains it at the end.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from moonlang.base import log
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.core.messages import Control, Ready
from moonlang.entrypoints import front, serving
from moonlang.entrypoints.serving import LAST_WORDS_S, Serving
from moonlang.roles import lifeline, process, topology
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.load_board import open_board
from moonlang.roles.mailboxes import open_mailbox
from moonlang.roles.process import Job, heartbeat_file

_log = log.get(__name__)


def main(path: Path) -> int:
    """The entry of the process; see `roles.process.main`."""
    return process.main(path, _run)


def _run(job: Job, directory: Path) -> None:
    args = job.args
    endpoint = open_mailbox(args.messaging_backend, job.role, job.addresses, job.token)
    heartbeat = Heartbeat(heartbeat_file(directory, job.role), args.watchdog_timeout)
    number = topology.fronts(args).index(job.role)
    board = open_board(directory, args, number)
    try:
        with front.sharing(args.host, args.port) as listener:
            made = serving.build(args, job.model, endpoint, {}, number=number, board=board)
            worker = _Worker(made, heartbeat)
            lifeline.finished_loading()
            endpoint.send(topology.API, Ready(role=job.role, pid=os.getpid()))
            worker.run(sockets=[listener])
    finally:
        endpoint.close()


class _Worker(front.Server):
    """Waits to be opened, serves, drains when it is told to, and then stays until SIGTERM."""

    def __init__(self, made: Serving, heartbeat: Heartbeat) -> None:
        super().__init__(made.config)
        self._client = made.client
        self._health = made.health
        self._heartbeat = heartbeat
        self._opened = asyncio.Event()
        self._ended = asyncio.Event()
        self._waiting: dict[str, tuple[str, Control]] = {}  # calls of the first front that get an answer later
        self._client.on_call = self._called

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end)
        self._beat(loop)
        self._client.start(loop)
        await self._opened.wait()
        if self.should_exit:
            return
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process
        await super().startup(sockets)
        self._health.state = "Up"
        self._answer("open")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._health.state = "Exiting"
        await super().shutdown(sockets)
        self._answer("drain")
        await self._ended.wait()
        self._client.close()

    def _called(self, source: str, call: Control) -> None:
        self._waiting[call.verb] = source, call
        match call.verb:
            case "open":
                self._open(call.args)
            case "drain":
                self._leave()
            case "fail":
                self._client.fail(str(call.args["why"]))
                self._leave()
                self._client.loop.call_later(LAST_WORDS_S, self._hurry)

    def _open(self, args: dict[str, Any]) -> None:
        self._client.ready.update(args["ready"])
        self._client.command = list(args["command"])
        self._opened.set()

    def _answer(self, verb: str) -> None:
        if verb in self._waiting:
            self._client.reply(*self._waiting.pop(verb))

    def _leave(self) -> None:
        self.should_exit = True
        self._opened.set()

    def _end(self) -> None:
        """SIGTERM: there is nothing to wait for any more."""
        self._leave()
        self._hurry()
        self._ended.set()

    def _hurry(self) -> None:
        self.force_exit = True

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._heartbeat.beat(monotonic_ns())
        loop.call_later(self._heartbeat.interval_ns / NS_PER_S, self._beat, loop)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
