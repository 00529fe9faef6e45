"""One running process: its output into a log, its notices, its end. Driven by the event loop of the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moonlang.base import notify
from moonlang.cluster.log_file import LogFile
from moonlang.roles.children import environment

_READ_BYTES = 1 << 16
_MESSAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start: see `member`. environment: on top of ours; inherited: descriptors that it gets."""

    kind: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Sequence[int] = ()


class Child:
    """A process from its start to its end.

    said: called with the fields of every notice; ended: called once, with its exit status (negative for a signal), when
    it is gone, has been reaped, and all it printed is in the log.
    """

    def __init__(
        self,
        launch: Launch,
        directory: Path,
        log: LogFile,
        notices: Path,
        said: Callable[[dict[str, str]], None],
        ended: Callable[[int], None],
    ) -> None:
        """notices: where its notice socket is to be. OSError when it cannot be started."""
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._said = said
        self._ended = ended
        self._notices_path = notices
        self._notices = _bound(notices)
        self._output, theirs = os.pipe()
        command = [sys.executable, "-m", "moonlang.cluster.member", str(os.getpid()), str(directory)]
        try:
            self._process = subprocess.Popen(
                [*command, launch.kind, *launch.arguments],
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                env=environment() | {notify.VARIABLE: str(notices)} | dict(launch.environment),
                pass_fds=launch.inherited,
                process_group=0,
            )
        except OSError:
            os.close(self._output)
            self._notices.close()
            raise
        finally:
            os.close(theirs)
        os.set_blocking(self._output, False)
        self.pid = self._process.pid
        self._handle = os.pidfd_open(self.pid)
        self._loop.add_reader(self._handle, self._gone)
        self._loop.add_reader(self._output, self._pass_output)
        self._loop.add_reader(self._notices, self._listen)

    def signal(self, number: signal.Signals) -> None:
        """To the process and, for SIGKILL, to whatever it has started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            signal.pidfd_send_signal(self._handle, number)

    def _pass_output(self) -> None:
        try:
            chunk = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return
        if chunk:
            self._log.write(chunk)
        else:
            self._loop.remove_reader(self._output)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while message := self._notices.recv(_MESSAGE_BYTES):
                self._said(notify.fields(message))

    def _gone(self) -> None:
        self.signal(signal.SIGKILL)  # what it has left running in its group
        status = self._process.wait()
        self._listen()
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._output, _READ_BYTES):
                self._log.write(chunk)
        self._log.end()
        for descriptor in (self._handle, self._output, self._notices):
            self._loop.remove_reader(descriptor)
        os.close(self._handle)
        os.close(self._output)
        self._notices.close()
        self._notices_path.unlink(missing_ok=True)
        self._ended(status)


def _bound(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    found.bind(str(path))
    return found
