"""The processes of a running server, read from /proc while some of them may come and go."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """Process ids of those that it has started itself."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += [int(word) for word in file.read_text().split()]
    return found


def jobs(pid: int) -> dict[Path, int]:
    """Process id of each role of a server that lives, by the file that tells it what to do."""
    found = {}
    for child in children(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found |= {Path(os.fsdecode(word)): child for word in words if word.endswith(b".json")}
    return found


def roles(pid: int) -> dict[str, int]:
    """The same by the names of the roles."""
    return {job.stem: child for job, child in jobs(pid).items()}


def mapping(pid: int, part: str) -> list[str]:
    """The server's roles, its first process as api, that have mapped a file with `part` in its name."""
    found = {"api": pid, **roles(pid)}
    return sorted(name for name, one in found.items() if part in Path(f"/proc/{one}/maps").read_text())
