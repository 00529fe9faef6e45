"""How ranks that wait for work wake each other, without a collective: a pipe to each, through which numbers go."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from pathlib import Path

from moonlang.base.errors import PeerError

_PHASE = struct.Struct("<q")
_READ_BYTES = 64 << 10  # all that a pipe holds
_ENDED = (errno.ENOENT, errno.ENXIO, errno.EPIPE)  # no such pipe, or nobody who reads it


class Bells:
    """The bell of rank `rank`, and the way to those of the others. prefix: path of all bells, on one host.

    Who has heard of a phase has taken all bells before it, and nobody rings for the phase after the next before this
    rank has come to it: a pipe never holds more than two bells of each rank, and has room for thousands.
    """

    def __init__(self, prefix: str, rank: int, size: int) -> None:
        self._own = Path(f"{prefix}-bell-{rank}")
        self._others = [f"{prefix}-bell-{other}" for other in range(size) if other != rank]
        self._ways: dict[str, int] = {}
        self._heard = -1
        os.mkfifo(self._own, 0o600)
        # For both: with a writer of its own a pipe has no end when others close theirs.
        self._pipe = os.open(self._own, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Readable when somebody has rung."""
        return self._pipe

    def ring(self, phase: int) -> None:
        """Wake all who wait for the beginning of this phase. PeerError when one takes no more bells."""
        frame = _PHASE.pack(phase)
        for path in self._others:
            try:
                if path not in self._ways:
                    self._ways[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.write(self._ways[path], frame)
            except OSError as error:
                if error.errno not in _ENDED:  # which others notice
                    raise PeerError("A rank does not wake up.", hint="Start the server again.") from error

    def heard(self, phase: int) -> bool:
        """Take all bells: whether this phase has begun. Those of earlier ones rang when this rank was awake."""
        with suppress(BlockingIOError):
            while frames := os.read(self._pipe, _READ_BYTES):  # bells are written whole
                self._heard = max(self._heard, *(number for (number,) in _PHASE.iter_unpack(frames)))
        return self._heard >= phase

    def close(self) -> None:
        for way in (self._pipe, *self._ways.values()):
            os.close(way)
        self._own.unlink(missing_ok=True)
