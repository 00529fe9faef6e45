"""A real server for tests that hurt it: its stderr line by line, its roles, and what it leaves behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes

import moonlang
from moonlang.base.clock import NS_PER_S, monotonic_ns

START_S = 120.0
STOP_S = 60.0
READY = "ready to roll"


class WatchedServer:
    """`python -m moonlang.launch_server` with temporary files in a folder of its own, `temporary`.

    lines: what it has printed on stderr so far.
    """

    def __init__(self, *flags: str) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        self.lines: list[str] = []
        self.port = 0
        self._printed = threading.Condition()
        root = str(Path(moonlang.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moonlang.launch_server", "--port", "0", *flags],
            env=os.environ | {"TMPDIR": str(self.temporary), "PYTHONPATH": root},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_line(self, text: str, timeout_s: float = START_S) -> str:
        """Wait until a line with `text` has been printed."""

        def found() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self._printed:
            self._printed.wait_for(lambda: found() or not self._reader.is_alive(), timeout_s)
            line = found()
        assert line is not None, f"no {text!r} in:\n" + "\n".join(self.lines)
        return line

    def wait_ready(self) -> None:
        """Wait until it serves, and learn its port."""
        self.port = int(self.wait_line("Listening on").rsplit(":", 1)[1])
        self.wait_line(READY)

    def wait_exit(self, timeout_s: float = STOP_S) -> int:
        """Its exit status, when all it said has been read."""
        status = self.process.wait(timeout_s)
        self._reader.join(STOP_S)
        return status

    def roles(self) -> dict[str, int]:
        """Process id of each role that lives, by name."""
        return processes.roles(self.process.pid)

    def left_behind(self) -> list[Path]:
        """What is still in its folder for temporary files."""
        return sorted(self.temporary.rglob("*"))

    def post(self, path: str, body: Any, timeout_s: float = 120) -> tuple[int, Any]:
        """Status and decoded answer of one POST."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def close(self) -> None:
        """Make an end of it, in whatever state it is."""
        pids = list(self.roles().values()) if self.process.poll() is None else []
        self.process.kill()
        self.wait_exit()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stderr is not None
        self.process.stderr.close()
        shutil.rmtree(self.temporary)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._printed:
                self.lines.append(line.rstrip("\n"))
                self._printed.notify_all()
        with self._printed:
            self._printed.notify_all()


@contextlib.contextmanager
def watched_server(*flags: str) -> Iterator[WatchedServer]:
    """A server that is gone at the end of the block. It need not be ready at its beginning."""
    server = WatchedServer(*flags)
    try:
        yield server
    finally:
        server.close()


class Watched:
    """Some processes, by handles that are not confused by later ones with the same number."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._handles = {name: os.pidfd_open(pid) for name, pid in pids.items()}

    def wait_gone(self, timeout_s: float) -> None:
        """Wait until all have ended."""
        deadline_ns = monotonic_ns() + int(timeout_s * NS_PER_S)
        for name, handle in self._handles.items():
            left_s = max(0.0, (deadline_ns - monotonic_ns()) / NS_PER_S)
            assert select.select([handle], [], [], left_s)[0], f"the {name} still lives"
            os.close(handle)
