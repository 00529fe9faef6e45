"""A short run of `benchmark/abuse.py`: nothing crashes, each mistake gets its clear 4xx, every page comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from live_server import LiveServer

SCRIPT = Path(__file__).parents[2] / "benchmark" / "abuse.py"


def test_two_hundred_requests_of_every_kind(server: LiveServer) -> None:
    command = [sys.executable, str(SCRIPT), "--url", server.url, "--requests", "200", "--concurrency", "32"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout, ended.stderr
    result = json.loads(ended.stdout)
    assert not result["failures"]
    assert sum(result["done"].values()) == 200
    assert ended.returncode == 0
    assert server.process.poll() is None
    assert "Traceback" not in server.log
