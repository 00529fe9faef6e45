"""Roles as threads of this process (`--in-process`), for debuggers and tests. An edge: everything is caught here."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from os import getpid

from moonlang.base.errors import ConfigError, MoonLangError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Ready
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.messaging.wakeup import Wakeup
from moonlang.roles import topology
from moonlang.roles.exits import Exit, OnExit
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.role import create, drive


class ThreadGroup:
    """The same as a ProcessGroup, without processes. A thread cannot be killed: one that hangs is left behind."""

    def __init__(
        self,
        heartbeats: dict[str, Heartbeat],
        args: ServerArgs,
        model: ModelConfig,
        hub: Hub,
        on_exit: OnExit,
    ) -> None:
        self._args = args
        self._model = model
        self._hub = hub
        self._heartbeats = heartbeats
        self._on_exit = on_exit
        self._stop = Wakeup()
        self._threads: Sequence[threading.Thread] = [
            threading.Thread(target=self._run, args=(name,), name=topology.title(name), daemon=True)
            for name in heartbeats
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Let every role finish its step and close."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self, name: str) -> None:
        error: MoonLangError | None = None
        try:
            self._live(name)
        except MoonLangError as caught:
            error = caught
            lines = traceback.format_exc().splitlines()
        except Exception:  # noqa: BLE001 - the edge of the role: whatever it was, the owner shows these lines
            lines = traceback.format_exc().splitlines()
        else:
            return
        if not self._stop.is_set:
            status = ConfigError.exit_status if isinstance(error, ConfigError) else 1
            self._on_exit(Exit(name=name, status=status, lines=tuple(lines), error=error))

    def _live(self, name: str) -> None:
        endpoint = InprocEndpoint(name, self._hub)
        role = create(name, self._args, self._model, endpoint)
        endpoint.send(topology.API, Ready(role=name, pid=getpid(), body=role.ready_body()))
        try:
            drive(role, endpoint, stop=self._stop, heartbeat=self._heartbeats[name])
        finally:
            role.close()
            endpoint.close()
