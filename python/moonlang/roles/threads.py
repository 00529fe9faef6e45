"""Roles as threads of this process (`--in-process`), for debuggers and tests. An edge: everything is caught here."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence

from moonlang.base.errors import ConfigError, MoonLangError
from moonlang.base.wakeup import Wakeup
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.roles import topology
from moonlang.roles.exits import Exit, OnExit
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.role import create, live


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
        try:
            self._live(name)
        except Exception as caught:  # noqa: BLE001 - the edge of the role: whatever it was, it is shown
            lines = traceback.format_exc().splitlines()
            error = caught if isinstance(caught, MoonLangError) else None
            wrong_config = isinstance(caught, ConfigError)
            if not wrong_config:
                sys.stderr.write("\n".join((*lines, "")))
            status = ConfigError.exit_status if wrong_config else 1
            self._on_exit(Exit(name=name, status=status, lines=tuple(lines), error=error))

    def _live(self, name: str) -> None:
        endpoint = InprocEndpoint(name, self._hub)
        role = create(name, self._args, self._model, endpoint)
        live(name, role, endpoint, stop=self._stop, heartbeat=self._heartbeats[name])
