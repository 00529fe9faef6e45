"""`moonlang logs [SERVER OR ROLE] [-f]`: what processes of a cluster print."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from moonlang.base.errors import ConfigError
from moonlang.cluster import control, directory
from moonlang.cluster.control import Order

TAIL_BYTES = 1 << 16
LOOK_S = 0.2


def main(argv: Sequence[str]) -> int:
    """Print them; with -f until the cluster ends. The exit status."""
    parser = argparse.ArgumentParser(prog="moonlang logs", description="Show what processes of a cluster print.")
    parser.add_argument("which", nargs="?", help="server-0, router, store; or a role: prefill, decode; all without it")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the cluster ends")
    parser.add_argument("-n", "--lines", type=int, default=50, help="of each, before what comes (50)")
    parser.add_argument("--name", help="of the cluster, when there are several")
    given = parser.parse_args(argv)
    card = directory.find(given.name)
    status = control.ask(directory.folder(card.name), Order(do="status")).status
    units = [] if status is None else status.units
    chosen = [unit for unit in units if given.which in (None, unit.name, unit.role)]
    if not chosen:
        hint = f"There are: {', '.join(f'{unit.name} ({unit.role})' for unit in units)}."
        raise ConfigError(f"Nothing here is called {given.which}.", hint=hint)
    tails = [_Tail(Path(unit.log), f"{unit.name}: " if len(chosen) > 1 else "") for unit in chosen]
    for tail in tails:
        tail.begin(given.lines)
    if given.follow:
        _follow(tails, card.pid)
    return 0


def _follow(tails: list[_Tail], pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        while not select.select([process], [], [], LOOK_S)[0]:
            for tail in tails:
                tail.go_on()
    except KeyboardInterrupt:
        pass  # whoever follows has seen enough
    finally:
        os.close(process)
    for tail in tails:
        tail.go_on()


class _Tail:
    """The end of a log, also when it has been moved away and begun anew. before: each line."""

    def __init__(self, path: Path, before: str) -> None:
        self._path = path
        self._before = before
        self._file: BinaryIO | None = None
        self._partial = b""

    def begin(self, lines: int) -> None:
        """Print the last lines that are there."""
        self._file = self._path.open("rb")
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - TAIL_BYTES))
        *whole, self._partial = self._file.read().split(b"\n")
        self._print(whole[-lines:] if lines > 0 else [])

    def go_on(self) -> None:
        """Print what has come."""
        assert self._file is not None
        self._print(self._new())
        try:
            moved = os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino
        except OSError:
            return  # the cluster has ended, and its folder with it
        if moved:
            self._file.close()
            self._file = self._path.open("rb")
            self._print(self._new())

    def _new(self) -> list[bytes]:
        assert self._file is not None
        *whole, self._partial = (self._partial + self._file.read()).split(b"\n")
        return whole

    def _print(self, lines: list[bytes]) -> None:
        for line in lines:
            sys.stdout.write(f"{self._before}{line.decode(errors='replace')}\n")
        sys.stdout.flush()
