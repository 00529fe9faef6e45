"""A process that runs, is stopped, and is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from moonlang.base.process_state import can_run


def test_can_run() -> None:
    assert can_run(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert can_run(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert not can_run(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not can_run(child.pid), "it is dead, though not yet collected"
    child.communicate()
    assert not can_run(child.pid)
