"""What each of several fronts has sent to each replica, in memory that they share: no messages, no locks."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from moonlang.config.server_args import ServerArgs

_NUMBER_BYTES = 8
_FILE = "loads"


class LoadBoard:
    """Row `front` is written by that front and read by the others. A number is stored in one piece; the two of a pair
    may be of different moments, which is near enough for spreading load."""

    def __init__(self, path: Path, front: int, fronts: int, replicas: int) -> None:
        size = fronts * replicas * 2 * _NUMBER_BYTES
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._numbers = memoryview(mmap.mmap(fd, size)).cast("q")
        finally:
            os.close(fd)
        self._row = front * replicas * 2
        self._step = replicas * 2

    def put(self, replica: int, requests: int, tokens: int) -> None:
        """Say what this front has at a replica."""
        at = self._row + replica * 2
        self._numbers[at] = requests
        self._numbers[at + 1] = tokens

    def total(self, replica: int) -> tuple[int, int]:
        """(requests, tokens) of all fronts at a replica."""
        requests = self._numbers[replica * 2 :: self._step]
        tokens = self._numbers[replica * 2 + 1 :: self._step]
        return sum(requests), sum(tokens)


def open_board(directory: Path, args: ServerArgs, front: int) -> LoadBoard | None:
    """The board of the server with this run directory; None when one front or one replica has nothing to say."""
    fronts, replicas = args.tokenizer_worker_num, args.dp_size
    return LoadBoard(directory / _FILE, front, fronts, replicas) if min(fronts, replicas) > 1 else None
