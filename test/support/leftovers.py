"""What a run of tests leaves behind: processes, files of servers, shared memory. A name in the environment, which all
that it starts inherits, tells its processes from those of others on this machine; the names of its servers' folders,
which the kernel notes for us, its shared memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest

from moonlang.base import clock
from moonlang.roles import run_directory

_VARIABLE = "MOONLANG_TEST_RUN"
_PATIENCE_NS = 30 * clock.NS_PER_S
_SHARED_MEMORY = Path("/dev/shm")
_HARMLESS = ("multiprocessing.resource_tracker",)  # ends with this process
_IN_CREATE = 0x100  # of inotify
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name


class Leftovers:
    """Begins with the tests. temporary: where all that they start has its temporary files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))  # short: paths of sockets are
        self._mark = f"{_VARIABLE}={self.temporary.name}".encode()
        self._notes = _watched(self.temporary)
        self._names: set[str] = set()
        patch.setenv(_VARIABLE, self.temporary.name)
        patch.setenv("TMPDIR", str(self.temporary))
        patch.setattr(tempfile, "tempdir", None)

    def check(self) -> None:
        """When the tests are over: nothing is left, and the folder goes."""
        deadline_ns = clock.monotonic_ns() + _PATIENCE_NS
        while (found := self._found()) and clock.monotonic_ns() < deadline_ns:
            clock.sleep_s(0.05)
        with contextlib.suppress(OSError):
            os.close(self._notes)
        shutil.rmtree(self.temporary, ignore_errors=True)
        assert not found, f"The tests leave behind: {found}"

    def _found(self) -> list[str]:
        run_directory.reap(self.temporary)  # as the next server would, when one was killed
        return [*self._processes(), *map(str, self.temporary.glob("moonlang-*")), *self._segments()]

    def _processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if int(process.name) != os.getpid() and self._mark in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {process.name}: {command}")
        return [line for line in found if not any(part in line for part in _HARMLESS)]

    def _segments(self) -> list[str]:
        """Shared memory is named like the folder of its server."""
        with contextlib.suppress(OSError):  # nothing more has been noted, or nothing can be
            while events := os.read(self._notes, 1 << 16):
                self._names |= _names(events)
        return [str(file) for file in _SHARED_MEMORY.glob("moonlang-*") if file.name.startswith(tuple(self._names))]


def _watched(folder: Path) -> int:
    """A descriptor from which one reads what has been made in this folder; -1 where the kernel does not do that."""
    libc = ctypes.CDLL(None)
    notes = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    libc.inotify_add_watch(notes, os.fsencode(folder), _IN_CREATE)
    return notes


def _names(events: bytes) -> set[str]:
    found, at = set(), 0
    while at < len(events):
        *_, size = _EVENT.unpack_from(events, at)
        at += _EVENT.size + size
        found.add(events[at - size : at].rstrip(b"\0").decode())
    return {name for name in found if name.startswith("moonlang-")}
