"""What a process prints, in a file that does not grow without end."""

from __future__ import annotations

from collections import deque
from pathlib import Path

MAX_BYTES = 16 << 20  # then the file becomes FILE.1, in place of an older one
KEPT_LINES = 30


class LogFile:
    """Output of one process after another. `lines`: the last ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._partial = b""
        path.touch(0o600)
        self._file = path.open("ab", buffering=0)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        *whole, self._partial = (self._partial + chunk).split(b"\n")
        self.lines.extend(line.decode(errors="replace") for line in whole)
        if self._file.tell() > MAX_BYTES:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self.path.touch(0o600)
            self._file = self.path.open("ab", buffering=0)

    def end(self) -> None:
        """The process has ended: what comes next is another's."""
        if self._partial:
            self.write(b"\n")

    def close(self) -> None:
        self._file.close()
