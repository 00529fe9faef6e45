"""A child process never outlives its parent, however that one died."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_TRIES = 100


def set_title(title: str) -> None:
    """Name this process in `ps` and `top` (the kernel keeps 15 characters)."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(title.encode()), 0, 0, 0)


def die_with(parent_pid: int, directory: Path) -> None:
    """When process `parent_pid` ends, delete `directory` and kill this process with the group it leads from now on.

    A thread waits for the parent's end. While the process is loading, maybe long in the middle of C code, the
    kernel sends SIGTERM as well.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        parent = -1
    if parent < 0 or os.getppid() != parent_pid:  # it died before we could watch it
        _vanish(directory)
    threading.Thread(target=_watch, args=(parent, directory), name="lifeline", daemon=True).start()


def become(command: Sequence[str], parent_pid: int) -> NoReturn:
    """Turn this process into another program that the kernel kills when process `parent_pid` ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
    os.execv(command[0], list(command))


def finished_loading() -> None:
    """From now on SIGTERM means an orderly end, which would be over before the thread has removed the folder."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def _watch(parent: int, directory: Path) -> None:
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    poll.poll()
    _vanish(directory)


def _vanish(directory: Path) -> None:
    for _ in range(_TRIES):  # this process, or another one about to end, may still be putting files there
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)
