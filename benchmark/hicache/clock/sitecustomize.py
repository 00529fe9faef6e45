"""Loaded by every Python process that has this folder in its PYTHONPATH: counts the processor time of checksums.

For `checksums.py` beside this folder. A process writes what it has spent to $CHECKSUM_CLOCK/PID, four numbers: seconds
in checksums alone and in copies with checksums, and the bytes of both.
"""

from __future__ import annotations

import mmap
import os
import time

import numpy as np


def _watch(folder: str) -> None:
    from moonlang.channels import moves

    move = moves.move
    totals: list[np.ndarray] = []

    def timed(parts: np.ndarray) -> np.ndarray:
        if not totals:
            path = os.path.join(folder, str(os.getpid()))
            with open(path, "w+b") as file:
                file.truncate(4 * 8)
                totals.append(np.frombuffer(mmap.mmap(file.fileno(), 4 * 8), np.float64))
        begin = time.thread_time()
        sums = move(parts)
        kind = int(parts[:, :, 1].any())
        totals[0][kind] += time.thread_time() - begin
        totals[0][2 + kind] += float(parts[:, :, 2].sum())
        return sums

    moves.move = timed


if "CHECKSUM_CLOCK" in os.environ:
    _watch(os.environ["CHECKSUM_CLOCK"])
