"""Roles as child processes: one thread starts them, passes on what they print, and sees them die."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError, MoonLangError, PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.roles import topology
from moonlang.roles.exits import Exit, OnExit
from moonlang.roles.process import Failure, failure_file, job_file

_KEPT_LINES = 30
_READ_BYTES = 1 << 16
_STDERR = 2


class _Child:
    """One running child with the end of its stderr."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial = b""
        self.output, child_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", topology.program(name), str(job_file(directory, name))],
                stdin=subprocess.DEVNULL,
                stdout=child_end,
                stderr=child_end,
                env=environment(),
            )
        finally:
            os.close(child_end)
        os.set_blocking(self.output, False)
        self.pidfd = os.pidfd_open(self.process.pid)

    def pass_output(self) -> bool:
        """Copy what the child has printed to our stderr; False at the end of its output."""
        try:
            chunk = os.read(self.output, _READ_BYTES)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        with contextlib.suppress(OSError):  # our own stderr is gone: the lines are still kept
            os.write(_STDERR, chunk)
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        self._lines.extend(line.decode(errors="replace") for line in lines)
        return True

    def ended(self) -> Exit:
        """Collect the dead child, its last words and its status, and whatever it has left running."""
        self.kill()
        status = self.process.wait()
        while self._more_output():
            pass
        if self._partial:
            self._lines.append(self._partial.decode(errors="replace"))
        return Exit(name=self.name, status=status, lines=tuple(self._lines), error=self._failure())

    def close(self) -> None:
        os.close(self.output)
        os.close(self.pidfd)

    def kill(self) -> None:
        """SIGKILL for the child and whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGKILL)  # it may not lead its group yet

    def _more_output(self) -> bool:
        """Read on, without waiting for grandchildren that keep the pipe open."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            return bool(selector.select(0)) and self.pass_output()

    def _failure(self) -> MoonLangError | None:
        try:
            failure = msgspec.json.decode(failure_file(self._directory, self.name).read_bytes(), type=Failure)
        except (OSError, msgspec.DecodeError):
            return None
        kind = ConfigError if failure.code == ConfigError.code else PeerError
        return kind(failure.message, hint=failure.hint)


class ProcessGroup:
    """All children of one server. `on_exit` is called from the group's thread for each one that ends.

    The kernel ties a child's parent-death signal to the thread that started it, so this thread lives until the last
    child is gone.
    """

    def __init__(self, names: Sequence[str], directory: Path, on_exit: OnExit) -> None:
        self._names = names
        self._directory = directory
        self._on_exit = on_exit
        self._stop = Wakeup()
        self._stop_timeout_s = 0.0
        self._thread = threading.Thread(target=self._run, name="moonlang-children", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """SIGTERM to all, SIGKILL to those that still live after `timeout_s`; returns when all are gone."""
        self._stop_timeout_s = timeout_s
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
        self._stop.close()

    def _run(self) -> None:
        children: dict[str, _Child] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop.fileno(), selectors.EVENT_READ)
            for name in self._names:
                try:
                    child = children[name] = _Child(name, self._directory)
                except OSError as error:
                    self._on_exit(Exit(name=name, status=1, error=PeerError(f"Cannot start the {name}: {error}.")))
                    continue
                selector.register(child.pidfd, selectors.EVENT_READ, child)
                selector.register(child.output, selectors.EVENT_READ, child)
            while not self._stop.is_set:
                self._watch(selector, children, None)
            self._terminate(selector, children)

    def _terminate(self, selector: selectors.BaseSelector, children: dict[str, _Child]) -> None:
        selector.unregister(self._stop.fileno())
        for child in children.values():
            child.process.terminate()
        deadline_ns = monotonic_ns() + int(self._stop_timeout_s * NS_PER_S)
        while children and (left_ns := deadline_ns - monotonic_ns()) > 0:
            self._watch(selector, children, left_ns / NS_PER_S)
        for child in children.values():
            child.kill()
        while children:
            self._watch(selector, children, None)

    def _watch(self, selector: selectors.BaseSelector, children: dict[str, _Child], timeout_s: float | None) -> None:
        """Handle what has happened to the children, waiting for it."""
        dead: list[_Child] = []
        for key, _ in selector.select(timeout_s):
            child = key.data
            if child is None:
                continue
            if key.fd == child.pidfd:
                dead.append(child)
            elif not child.pass_output():
                selector.unregister(child.output)
        for child in dead:
            selector.unregister(child.pidfd)
            with contextlib.suppress(KeyError):  # its output may have ended before it did
                selector.unregister(child.output)
            del children[child.name]
            end = child.ended()
            child.close()
            self._on_exit(end)


def environment() -> dict[str, str]:
    """Ours, for a child in Python, with the folder of this very package first on its path."""
    root = str(Path(__file__).parents[2])
    rest = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{rest}" if rest else root}
