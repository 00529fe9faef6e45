"""A short run of `benchmark/differential/run.py`: a small cache above two others answers as the plain server does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from live_server import LiveServer

SCRIPT = Path(__file__).parents[2] / "benchmark" / "differential" / "run.py"


def test_random_requests_have_the_same_answers(server: LiveServer) -> None:
    short = ("--requests", "50", "--shapes", "write_back", "--reference", server.url)
    command = [sys.executable, str(SCRIPT), *short]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "50 chains, 0 wrong" in ended.stdout
