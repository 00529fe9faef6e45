"""Real servers and routers in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import httpx
from free_ports import free_port
from processes import jobs, roles

from moonlang.base import clock

PACKAGE_FOLDER = Path(__file__).parents[2] / "python"
START_S = 180
STOP_S = 120
MODEL_VARIABLE = "MOONLANG_E2E_MODEL"  # another checkpoint than the embedded one


class LiveProcess:
    """`python -m MODULE` on a free port, logging into `folder`. As a context manager: up inside it.

    ready_path: answers 200 when it is up. environment: on top of that of the tests.
    """

    def __init__(
        self,
        folder: Path,
        module: str,
        *flags: str,
        ready_path: str = "/ready",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._environment = environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"{module}-{self.port}.log"
        self._ready_path = ready_path
        self._command = [sys.executable, "-m", module, "--port", str(self.port), *flags]
        self.process = self._started()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> Self:
        try:
            self.wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_again(self) -> None:
        """Start a successor with the same command line, when it has ended."""
        self.process.wait(STOP_S)
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(PACKAGE_FOLDER), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, **self._environment}
        with self.log_path.open("ab") as output:
            return subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        self.http.close()
        try:
            self.stop()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(STOP_S)

    def until(self, true: Callable[[], Any], timeout_s: float = 90) -> None:
        """Wait for something to become true."""
        deadline_ns = clock.monotonic_ns() + int(timeout_s * clock.NS_PER_S)
        while not true():
            assert clock.monotonic_ns() < deadline_ns, f"not within {timeout_s} s:\n{self.log}"
            clock.sleep_s(0.01)

    def roles(self) -> dict[str, int]:
        """Process id of each role that lives, by name."""
        return roles(self.process.pid)

    def run_directory(self) -> Path:
        """Its folder, whose name is that of its shared memory too."""
        return next(job.parent for job in jobs(self.process.pid))

    def wait_until_up(self) -> None:
        """Wait until it takes requests."""
        deadline_ns = clock.monotonic_ns() + START_S * clock.NS_PER_S
        while clock.monotonic_ns() < deadline_ns:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            try:
                if self.http.get(self._ready_path).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            clock.sleep_s(0.05)
        raise AssertionError(f"not up after {START_S} s:\n{self.log}")


class LiveServer(LiveProcess):
    """A server, `python -m moonlang.launch_server`."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        model = ["--model-path", os.environ[MODEL_VARIABLE]] if MODEL_VARIABLE in os.environ else []
        super().__init__(folder, "moonlang.launch_server", *model, *flags, environment=environment)

    def loads(self) -> list[dict[str, float]]:
        """Each scheduler's own numbers."""
        return [state["load"] for state in self.http.get("/server_info").json()["internal_states"]]

    def load(self) -> dict[str, float]:
        """Those of the first one."""
        return self.loads()[0]

    def wait_idle(self, timeout_s: float = 90) -> dict[str, float]:
        """The first scheduler's numbers as soon as nothing runs or waits and no page is leased anywhere."""
        busy = ("num_running", "num_waiting", "num_grammar", "used_tokens")
        deadline_ns = clock.monotonic_ns() + int(timeout_s * clock.NS_PER_S)
        while True:
            loads = self.loads()
            if not any(load[name] for load in loads for name in busy):
                return loads[0]
            assert clock.monotonic_ns() < deadline_ns, f"still busy after {timeout_s} s: {loads}"
            clock.sleep_s(0.01)


def free_ports() -> int:
    """The first of three neighbouring ports that nobody listens on."""
    return free_port(neighbours=2)
