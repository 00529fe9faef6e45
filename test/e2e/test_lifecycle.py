"""The end of a server: on signals, with requests in flight, and when a part of it dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import PACKAGE_FOLDER, LiveServer

FLAGS = ("--max-total-tokens", "20000")
PATIENCE_S = 60.0  # far below --watchdog-timeout, by which a dead scheduler would be noticed at last
LONG = {"text": "Once", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}


class Reader(threading.Thread):
    """A client in a thread that reads one stream to its end."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__()
        self.events: list[str] = []
        self.begun = threading.Event()
        self._url = server.url
        self.start()

    def run(self) -> None:
        with (
            httpx.Client(base_url=self._url, timeout=120) as http,
            http.stream("POST", "/generate", json=LONG) as response,
        ):
            try:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.begun.set()
            except httpx.RemoteProtocolError:
                self.events.append("cut off")


def children(server: LiveServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_sigterm_lets_requests_finish_and_exits_with_0(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS) as server:
        roles = children(server)
        reader = Reader(server)
        assert reader.begun.wait(PATIENCE_S)
        assert server.stop(signal.SIGTERM) == 0
        reader.join(PATIENCE_S)
        assert reader.events[-1] == "[DONE]"
        assert json.loads(reader.events[-2])["meta_info"]["completion_tokens"] == 400
        assert not psutil.wait_procs(roles, PATIENCE_S)[1]
        with pytest.raises(httpx.ConnectError):
            server.http.get("/health")


def test_a_dead_scheduler_ends_the_server(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS) as server:
        roles = children(server)
        (scheduler,) = [role for role in roles if "scheduler" in " ".join(role.cmdline())]
        reader = Reader(server)
        assert reader.begun.wait(PATIENCE_S)
        scheduler.kill()
        assert server.process.wait(PATIENCE_S) == 1
        reader.join(PATIENCE_S)
        assert "killed by SIGKILL" in server.log
        assert json.loads(reader.events[-2])["error"]["code"] == 503
        assert reader.events[-1] == "[DONE]"
        assert not psutil.wait_procs(roles, PATIENCE_S)[1]


def test_a_taken_port_is_known_before_the_model_is_loaded(server: LiveServer) -> None:
    command = [sys.executable, "-m", "moonlang.launch_server", "--port", str(server.port)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_FOLDER)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert re.search(rf"Cannot listen on 127.0.0.1:{server.port}.*--port", ended.stderr)
    assert "KV Cache" not in ended.stderr
