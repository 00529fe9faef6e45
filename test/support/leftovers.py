"""What a run of tests leaves behind: processes, files of servers, shared memory. A name in the environment, which all
that it starts inherits, tells its processes from those of others on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from moonlang.base import clock
from moonlang.roles import run_directory

_VARIABLE = "MOONLANG_TEST_RUN"
_PATIENCE_NS = 30 * clock.NS_PER_S
_SHARED_MEMORY = Path("/dev/shm")
_OURS = ("moonlang-*", "mcss_*")
_HARMLESS = ("multiprocessing.resource_tracker",)  # ends with this process


class Leftovers:
    """Begins with the tests. temporary: where all that they start has its temporary files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))  # short: paths of sockets are
        self._mark = f"{_VARIABLE}={self.temporary.name}".encode()
        self._segments = set(_segments())
        patch.setenv(_VARIABLE, self.temporary.name)
        patch.setenv("TMPDIR", str(self.temporary))
        patch.setattr(tempfile, "tempdir", None)

    def check(self) -> None:
        """When the tests are over: nothing is left, and the folder goes."""
        deadline_ns = clock.monotonic_ns() + _PATIENCE_NS
        while (found := self._found()) and clock.monotonic_ns() < deadline_ns:
            clock.sleep_s(0.05)
        shutil.rmtree(self.temporary, ignore_errors=True)
        assert not found, f"The tests leave behind: {found}"

    def _found(self) -> list[str]:
        run_directory.reap(self.temporary)  # as the next server would, when one was killed
        return [*self._processes(), *map(str, self.temporary.glob("moonlang-*")), *self._new_segments()]

    def _processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if int(process.name) != os.getpid() and self._mark in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {process.name}: {command}")
        return [line for line in found if not any(part in line for part in _HARMLESS)]

    def _new_segments(self) -> list[str]:
        """Shared memory with a name that nobody has mapped."""
        new = [segment for segment in _segments() if segment not in self._segments]
        if not new:
            return []
        maps = ""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                maps += (process / "maps").read_text()
        return [str(segment) for segment in new if str(segment) not in maps]


def _segments() -> list[Path]:
    return [segment for pattern in _OURS for segment in _SHARED_MEMORY.glob(pattern)]
