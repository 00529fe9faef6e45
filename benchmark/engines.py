"""Start an engine by its command line, wait for /health, stop it; and say on which machine a figure was measured."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

MOONLANG = (
    f"{sys.executable} -m moonlang.launch_server --model-path {{model}} --port {{port}} --served-model-name bench"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, slots=True)
class Server:
    """A running engine. start_s: seconds from its start to the first answer of /health."""

    process: subprocess.Popen[bytes]
    port: int
    start_s: float

    def tree(self) -> list[psutil.Process]:
        """The processes that are alive, the first one first."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stop it where it stands: an engine whose threads spin would take the cores from the one whose turn it is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def memory_mb(self) -> float:
        """Proportional share of memory (PSS) of its processes."""
        total = 0
        for process in self.tree():
            with suppress(psutil.Error):  # it ended meanwhile
                total += process.memory_full_info().pss
        return total / 1e6

    def _signal(self, number: signal.Signals) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def serving(command: str, model: Path, log: Path, timeout_s: float = 420) -> Iterator[Server]:
    """Run `command` with {model} and {port} filled in; yields once /health answers, ends the process after.

    RuntimeError when the server ends or is not healthy in time, OSError when there is no such command.
    """
    port = free_port()
    words = shlex.split(command.format(model=model, port=port))
    begin = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        server = Server(process, port, 0.0)
        try:
            _wait_healthy(process, port, log, begin + timeout_s)
            yield replace(server, start_s=time.monotonic() - begin)
        finally:
            server.resume()
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError(f"The server was not healthy in time; see {log}")


def machine() -> dict[str, Any]:
    """What a reader must know to compare a figure with another machine's."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    versions: dict[str, str] = {}
    for name in ("torch", "transformers", "uvicorn", "pyzmq"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }
