"""A real server in its own process, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import httpx

from moonlang.base import clock

PACKAGE_FOLDER = Path(__file__).parents[2] / "python"
START_S = 180
STOP_S = 30
MODEL_VARIABLE = "MOONLANG_E2E_MODEL"  # another checkpoint than the embedded one


class LiveServer:
    """`python -m moonlang.launch_server` on a free port, logging into `folder`. As a context manager: up inside it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        model = ["--model-path", os.environ[MODEL_VARIABLE]] if MODEL_VARIABLE in os.environ else []
        command = [sys.executable, "-m", "moonlang.launch_server", "--port", str(self.port), *model, *flags]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE_FOLDER)}
        with self.log_path.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> LiveServer:
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    def load(self) -> dict[str, float]:
        """The scheduler's own numbers."""
        return self.http.get("/server_info").json()["internal_states"][0]["load"]

    def wait_idle(self, timeout_s: float = 20) -> dict[str, float]:
        """The scheduler's numbers as soon as nothing runs or waits and no page is leased."""
        deadline_ns = clock.monotonic_ns() + int(timeout_s * clock.NS_PER_S)
        while True:
            load = self.load()
            if load["num_running"] + load["num_waiting"] + load["num_grammar"] + load["used_tokens"] == 0:
                return load
            assert clock.monotonic_ns() < deadline_ns, f"still busy after {timeout_s} s: {load}"
            clock.sleep_s(0.01)

    def _wait_until_up(self) -> None:
        deadline_ns = clock.monotonic_ns() + START_S * clock.NS_PER_S
        while clock.monotonic_ns() < deadline_ns:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            clock.sleep_s(0.05)
        raise AssertionError(f"not up after {START_S} s:\n{self.log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
