"""A store in a directory, shared by every server that can reach it. A file is one object.

Crash-safe: a file is written under another name and renamed when it is whole. A reader believes nothing (see
`manifest`), so files need no fsync: one that a power cut has damaged is a miss. The directory is bounded: when it grows
over its capacity, the files that were used least recently go, down to nine tenths.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from moonlang.base.clock import wall_s
from moonlang.base.errors import ConfigError, PeerError
from moonlang.base.units import parse_bytes
from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.storage.channel import Headers, StoreChannel, StoreOptions

DIRECTORY_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
_DEFAULT_DIRECTORY = "/tmp/hicache"
_DEFAULT_CAPACITY = "10gb"
_KEPT = 0.9  # of the capacity, after clearing up
_SUFFIX = ".page"
_DRAFT_S = 3600  # nobody writes so long


class FileStore:
    """Files `<name>.page`. capacity: bytes of all files in the directory."""

    name = "file"

    def __init__(self, directory: Path, capacity: int) -> None:
        self._directory = directory
        self._capacity = capacity
        self._writer, self._drafts = uuid.uuid4().hex, 0  # name drafts that nobody else writes
        self._pools: Sequence[Bytes]
        self._headers: Headers
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_old_drafts()
            self._bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise ConfigError(
                f"{directory} cannot hold the KV store: {error.strerror}.",
                hint=f'Set {DIRECTORY_VARIABLE} or {{"directory": ...}} to a folder that can be written to.',
            ) from error

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        self._pools, self._headers = pools, headers

    def leading(self, names: Sequence[str]) -> int:
        return next((i for i, name in enumerate(names) if not os.access(self._path(name), os.F_OK)), len(names))

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            parts = self._parts(self._headers.read[i], page)
            try:
                file = os.open(self._path(name), os.O_RDONLY)
                try:
                    count = os.readv(file, parts)
                    os.utime(file)  # used now
                finally:
                    os.close(file)
            except FileNotFoundError:
                return i
            except OSError as error:
                raise PeerError(f"{self._path(name)} cannot be read: {error.strerror}.") from error
            if count < sum(map(len, parts)):
                return i  # cut short
        return len(names)

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            path = self._path(name)
            if not os.access(path, os.F_OK):
                self._write(path, self._parts(self._headers.written[i], page))
        if self._bytes > self._capacity:
            self._clear_up()
        return len(names)

    def discard(self, names: Sequence[str]) -> None:
        for name in names:
            Path(self._path(name)).unlink(missing_ok=True)

    def clear(self, prefix: str) -> None:
        for path, _, _ in self._files():
            if path.name.startswith(prefix):
                path.unlink(missing_ok=True)
        self._bytes = sum(size for _, size, _ in self._files())

    def close(self) -> None:
        pass

    def _parts(self, header: Bytes, page: int) -> list[memoryview]:
        """Where header and page of an object are."""
        return [header.data, *(pool[page].data for pool in self._pools)]

    def _path(self, name: str) -> str:
        """A text: thousands a second are made beside a model that computes."""
        return f"{self._directory}/{name}{_SUFFIX}"

    def _write(self, path: str, parts: list[memoryview]) -> None:
        self._drafts += 1
        draft = f"{self._directory}/{self._writer}-{self._drafts}.draft"
        size = sum(map(len, parts))
        try:
            file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                written = os.writev(file, parts)
            finally:
                os.close(file)
            if written < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(draft, path)
        except OSError as error:
            Path(draft).unlink(missing_ok=True)
            raise PeerError(f"{path} cannot be written: {error.strerror}.") from error
        self._bytes += size

    def _remove_old_drafts(self) -> None:
        """What servers that were killed have left behind; younger ones may be under way."""
        for draft in self._directory.glob("*.draft"):
            with contextlib.suppress(FileNotFoundError):
                if draft.stat().st_mtime < wall_s() - _DRAFT_S:
                    draft.unlink()

    def _files(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of every page, also of those that other servers wrote."""
        found: list[tuple[Path, int, float]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # somebody else is clearing up
                        status = entry.stat()
                        found.append((Path(entry.path), status.st_size, status.st_mtime))
        return found

    def _clear_up(self) -> None:
        files = sorted(self._files(), key=lambda file: file[2])
        self._bytes = sum(size for _, size, _ in files)
        for path, size, _ in files:
            if self._bytes <= _KEPT * self._capacity:
                break
            path.unlink(missing_ok=True)
            self._bytes -= size


def open_store(options: StoreOptions) -> KvStore:
    """extra config: {"directory": "/mnt/cache", "capacity": "100gb"}."""
    directory = options.extra.get("directory") or os.environ.get(DIRECTORY_VARIABLE) or _DEFAULT_DIRECTORY
    capacity = parse_bytes(options.extra.get("capacity", _DEFAULT_CAPACITY), "The capacity of the file store")
    return StoreChannel(FileStore(Path(str(directory)), capacity), options)


BACKEND = open_store
