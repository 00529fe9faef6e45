"""`moonlang up` as a user starts it, in a session and a folder for temporary files of its own, so that leaks show."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from moonlang.base import clock
from moonlang.roles.children import environment

START_S = 120.0
STOP_S = 60.0
GONE_S = 60.0
_PORT_TROUBLE = re.compile(r"in use|annot listen|annot bind|bind error|is taken", re.IGNORECASE)


class LiveCluster:
    """flags: of `moonlang up`. before: words in front of the command, like `ip netns exec NAME`."""

    def __init__(self, *flags: str, name: str = "test", before: Sequence[str] = ()) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        self.logs = Path(tempfile.mkdtemp(prefix="l-", dir="/tmp"))
        self.output = self.logs / "up.out"
        self._name = name
        self._before = tuple(before)
        self._environment = environment() | {"TMPDIR": str(self.temporary)}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*before, *_MOONLANG, "up", "--name", name, "--log-dir", str(self.logs), *flags],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pids: set[int] = set()
        self._before_us = {path.name for path in Path("/dev/shm").iterdir()}  # of dead ones whose numbers come again
        self._url = ""
        self.http = httpx.Client(timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The public address, as soon as it has been said."""
        if not self._url:
            self.until(lambda: re.search(r"http://\S+", self.said))
            found = re.search(r"http://\S+", self.said)
            assert found is not None
            self._url = found[0]
        return self._url

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_ready(self) -> None:
        self.until(lambda: "is ready after" in self.said, START_S)

    def until(self, true: Callable[[], Any], timeout_s: float = 120.0) -> None:
        """Wait for something to become true, while the cluster lives."""
        deadline_ns = clock.monotonic_ns() + int(timeout_s * clock.NS_PER_S)
        while not true():
            assert self.process.poll() is None, f"it has ended:\n{self.said}"
            assert clock.monotonic_ns() < deadline_ns, f"not within {timeout_s} s:\n{self.said}\n{self.all_logs()}"
            clock.sleep_s(0.02)

    def command(self, *words: str, fails: bool = False) -> str:
        """What another command of moonlang prints about it."""
        done = subprocess.run(
            [*self._before, *_MOONLANG, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [*self._before, *_MOONLANG, "status", self._name, "--json"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        return json.loads(done.stdout)[0]

    def unit(self, name: str) -> dict[str, Any]:
        return next(unit for unit in self.status()["units"] if unit["name"] == name)

    def ask(self, text: str = "Once upon a time", tokens: int = 4, **more: Any) -> httpx.Response:
        """One answer."""
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return self.http.post(f"{self.url}/generate", json={"text": text, "sampling_params": sampling, **more})

    def members(self) -> dict[int, str]:
        """Its living processes with their names; found by their session."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                head, _, rest = (process / "stat").read_text().rpartition(")")
                state, _, _, session, *_ = rest.split()
                if int(session) == self.process.pid and state not in "ZX":
                    found[int(process.name)] = head.partition("(")[2]
        self._pids |= found.keys()
        return found

    def all_logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("*.log")))

    def port_trouble(self) -> list[str]:
        """Lines of its logs in which somebody did not get a port."""
        return [line for line in f"{self.said}\n{self.all_logs()}".splitlines() if _PORT_TROUBLE.search(line)]

    def kill(self) -> None:
        """SIGKILL for the parent of all."""
        self.members()
        self.process.kill()
        self.process.wait(STOP_S)

    def left_behind(self, patience_s: float = GONE_S) -> list[str]:
        """Processes, files and shared memory that outlive it."""
        deadline_ns = clock.monotonic_ns() + int(patience_s * clock.NS_PER_S)
        while (found := self._left()) and clock.monotonic_ns() < deadline_ns:
            clock.sleep_s(0.02)
        return found

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End it in order; its exit status."""
        self.members()
        self.process.send_signal(how)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.kill()
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.logs, ignore_errors=True)

    def _left(self) -> list[str]:
        names = [
            (path.name, set(re.findall(r"\d+", path.name)))
            for path in Path("/dev/shm").iterdir()
            if path.name not in self._before_us
        ]
        memory = [name for name, numbers in names if numbers & set(map(str, self._pids))]
        files = [
            f"{folder}/{name}" for folder, folders, names in os.walk(self.temporary) for name in (*folders, *names)
        ]
        return [*(f"{pid} {name}" for pid, name in self.members().items()), *files, *memory]


_MOONLANG = (sys.executable, "-m", "moonlang")
