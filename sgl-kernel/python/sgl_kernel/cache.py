"""Packed weights on disk: a second start maps them instead of packing again.

One file holds all weights of a model. It is used where it lies: mapped on 2 MB pages, so that no memory has to be found
and cleared for the weights, and processes that serve the same model share one copy. Where the file system has no such
pages, the weights are copied to memory that has.

    header   magic, offset and size of the table, its checksum; 64 bytes
    weights  each on a multiple of 64 bytes
    table    JSON: the key, and per weight its offset, size, checksum and form (what its bytes do not say)

Files are written beside their place and renamed, and verified whole when they are opened: one that is cut short,
damaged, or of another key counts as absent and is deleted. The folder is bounded; files unused for longest go first.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from sgl_kernel import _C

_HEADER = struct.Struct("<8sQQQ32x")
_MAGIC = b"MLPACK02"
_ALIGN = 64

# Written in such pieces, a file lies in memory on 2 MB pages: the kernel takes pages of the size of a write.
_PIECE = 2 << 20

Pack = Callable[[Any], Any]  # packs a weight into the arena it is given


class PackedWeights(Protocol):
    """The weights of one model, asked for one by one, in the same order at every start.

    A context: what was packed inside is kept when it ends without an exception.
    """

    def weight(self, pack: Pack) -> Any:
        """The next weight: the stored one, or what `pack` makes."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Keep what was packed, or, after an exception, drop it."""
        ...


class Unkept:
    """PackedWeights that are packed at every start."""

    def __init__(self) -> None:
        self._arena = _C.Arena()

    def weight(self, pack: Pack) -> Any:
        return pack(self._arena)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


class Stored(Unkept):
    """PackedWeights of a file. ValueError or OSError when it is not a whole and sound file of that key."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__()
        self._file = _map(path)
        self._entries = iter(self._verified(key))
        self._copies = None if _on_huge_pages(self._file) else self._arena

    def weight(self, pack: Pack) -> Any:
        entry = next(self._entries)
        return _C.restore(self._file, entry["offset"], self._copies, **entry["form"])

    def _verified(self, key: str) -> list[dict[str, Any]]:
        file = self._file
        magic, offset, size, checksum = _HEADER.unpack(file.read(0, _HEADER.size))
        if magic != _MAGIC or file.checksum(offset, size) != checksum:
            raise ValueError("not a whole file of packed weights")
        table = json.loads(file.read(offset, size))
        if table["key"] != key:
            raise ValueError("packed weights of another model")
        for entry in table["weights"]:
            if file.checksum(entry["offset"], entry["bytes"]) != entry["checksum"]:
                raise ValueError("a damaged weight")
        return table["weights"]


class _Pieces:
    """A new file, written in whole pieces."""

    def __init__(self, path: Path) -> None:
        self.offset = 0
        self._file = path.open("wb")
        self._rest = bytearray()

    def write(self, content: Any) -> None:
        view = memoryview(content)
        self.offset += len(view)
        if self._rest:
            missing = _PIECE - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < _PIECE:
                return
            self._file.write(self._rest)
            self._rest.clear()
        whole = len(view) // _PIECE * _PIECE
        self._file.write(view[:whole])
        self._rest += view[whole:]

    def finish(self, start: bytes) -> None:
        """Write what is left, and `start` over the beginning."""
        self._file.write(self._rest)
        self._file.seek(0)
        self._file.write(start)
        self._file.close()

    def close(self) -> None:
        self._file.close()


class Kept(Unkept):
    """PackedWeights that are packed, and written to `path` on the way. limit_bytes: of the file.

    A file that cannot be written, or grows beyond the limit, is given up without a word: the next start packs again.
    confirm: asked at the end; False drops the file. kept: called when the file is in its place.
    """

    def __init__(
        self, path: Path, key: str, limit_bytes: int, confirm: Callable[[], bool], kept: Callable[[], None]
    ) -> None:
        super().__init__()
        self._path = path
        self._unfinished = path.with_suffix(f".{os.getpid()}.new")
        self._key = key
        self._limit_bytes = limit_bytes
        self._confirm = confirm
        self._kept = kept
        self._entries: list[dict[str, Any]] = []
        self._file: _Pieces | None = None
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = _Pieces(self._unfinished)
            self._file.write(bytes(_HEADER.size))

    def weight(self, pack: Pack) -> Any:
        packed = pack(self._arena)
        self._append(packed.memory(), _C.form(packed))
        return packed

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None or not self._confirm():
            self._give_up()
        elif self._file is not None:
            try:
                self._finish(self._file)
            except OSError:
                self._give_up()

    def _append(self, memory: Any, form: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            offset = self._file.offset
            if offset + memory.size > self._limit_bytes:
                self._give_up()
                return
            self._file.write(memory)
            self._file.write(bytes(-memory.size % _ALIGN))
        except OSError:
            self._give_up()
            return
        checksum = _C.block_checksum(memory)
        self._entries.append({"offset": offset, "bytes": memory.size, "checksum": checksum, "form": form})

    def _finish(self, file: _Pieces) -> None:
        table = np.frombuffer(json.dumps({"key": self._key, "weights": self._entries}).encode(), np.uint8)
        offset = file.offset
        if offset + table.size > self._limit_bytes:
            self._give_up()
            return
        file.write(table)
        file.finish(_HEADER.pack(_MAGIC, offset, table.size, _C.block_checksum(table)))
        self._unfinished.replace(self._path)
        self._kept()

    def _give_up(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._unfinished.unlink()
        self._file = None


class PackedCache:
    """A folder of packed weights.

    folder: default MOONLANG_PACKED_CACHE or ~/.cache/moonlang/packed.
    limit_bytes: of the folder; default MOONLANG_PACKED_CACHE_GB or 32 GB. 0: nothing is read or kept.
    """

    def __init__(self, folder: str | None = None, limit_bytes: int | None = None) -> None:
        named = folder or os.environ.get("MOONLANG_PACKED_CACHE", "~/.cache/moonlang/packed")
        self.folder = Path(named).expanduser()
        limit_gb = float(os.environ.get("MOONLANG_PACKED_CACHE_GB", "32"))
        self.limit_bytes = int(limit_gb * 1e9) if limit_bytes is None else limit_bytes

    def open(self, key: str, confirm: Callable[[], bool] = lambda: True) -> PackedWeights:
        """The weights that `key` stands for: everything that decides their bytes must be in it.

        key: hexadecimal. confirm: whether `key` still describes the sources; asked before weights packed now are kept.
        """
        path = self.folder / f"{key}.packed"
        try:
            stored = Stored(path, key)
            os.utime(path)  # its turn to be deleted starts anew
            return stored
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):  # not ours, cut short, or damaged
            with suppress(OSError):
                path.unlink()
        limit_bytes = min(self.limit_bytes, _free_bytes(self.folder) // 2)  # other programs live on the disk too
        return Kept(path, key, limit_bytes, confirm, self._keep_within_limit)

    def _keep_within_limit(self) -> None:
        """Delete what was unused for longest."""
        files = []
        with suppress(OSError):
            for file in self.folder.iterdir():
                with suppress(OSError):  # another process may be deleting too
                    stat = file.stat()
                    files.append((stat.st_mtime_ns, stat.st_size, file))
        used = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if used <= self.limit_bytes:
                return
            with suppress(OSError):
                file.unlink()
            used -= size


def _map(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return _C.MappedFile.open(str(path))
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _on_huge_pages(file: Any) -> bool:
    """Whether reading weights where they lie is as fast as reading them from an arena. All of it has been touched."""
    return file.on_huge_pages


def _free_bytes(folder: Path) -> int:
    """On the disk of the folder, or of the nearest parent that is there."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(existing).free
