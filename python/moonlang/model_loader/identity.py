"""What a checkpoint file contains, as a number that names it."""

from __future__ import annotations

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moonlang.base.clock import NS_PER_S, wall_s

_CHUNK = 64 << 20
_SETTLED_S = 2.0  # a file changed after that could carry the times of its last change still: clocks of files are coarse


def content_id(path: Path, records: Path | None = None) -> str:
    """Hex SHA-256 of the SHA-256 of each 64 MiB of the file.

    Reading it all takes a second per gigabyte or two, so the result is kept in the folder `records` under the file's
    device, inode, size, and times of its last change of content and of its inode, to the nanosecond. No system call
    sets the latter, so a changed file is never taken for the one that was read; a file changed within the last
    two seconds is not recorded. A copied or touched file is read again. OSError when it cannot be read.
    """
    before = path.stat()
    record = None if records is None else records / f"{_digest(_stamp(before).encode())}.content"
    if record is not None:
        with suppress(OSError):
            known = record.read_text()
            if len(known) == hashlib.sha256().digest_size * 2:
                os.utime(record)
                return known
    found = _read(path)
    settled_ns = int((wall_s() - _SETTLED_S) * NS_PER_S)
    if record is not None and _stamp(path.stat()) == _stamp(before) and max(_changed_ns(before)) < settled_ns:
        with suppress(OSError):
            record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = record.with_suffix(f".{os.getpid()}.new")
            unfinished.write_text(found)
            unfinished.replace(record)
    return found


def _read(path: Path) -> str:
    with path.open("rb") as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return _digest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            digests = list(pool.map(lambda at: hashlib.sha256(view[at : at + _CHUNK]).digest(), range(0, size, _CHUNK)))
    return _digest(b"".join(digests))


def _changed_ns(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_ctime_ns


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {_changed_ns(stat)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
