"""Packed weights on disk, so that a second start does not pack again.

One file per weight: a header, then the packed bytes. The name is the content key: a checksum of the source matrices,
their shapes and types, the packing and the version of the layout, so a changed weight never finds an old file. Files
are written beside their place and renamed, mapped when read, and verified while they are copied to huge pages; a
damaged file is deleted and counts as absent. The folder is bounded: the files unused for longest go first.
"""

import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sgl_kernel import _C

_LAYOUT = 1  # one more whenever cpp/ops/pack.h changes what the bytes mean
_HEADER = struct.Struct("<8sQ48x")  # magic, checksum; padded to a cache line
_MAGIC = b"MLPACK01"


def content_key(sources: Sequence[Any], kind: str, gated: bool) -> str:
    """32 hex digits that change with any byte, shape or type of the sources [N, K] and with how they are packed."""
    text = f"{_LAYOUT} {sys.byteorder} {kind} {gated}"
    key = [0, 1]
    for source in sources:
        text += f" {tuple(source.shape)} {source.dtype}"
        key = [_C.content_checksum(source, part) for part in key]
    described = np.frombuffer(text.encode(), np.uint8)
    return "".join(f"{_C.checksum(described, part):016x}" for part in key)


class PackedCache:
    """A folder of packed weights.

    folder: default MOONLANG_PACKED_CACHE or ~/.cache/moonlang/packed.
    limit_bytes: default MOONLANG_PACKED_CACHE_GB or 32 GB.
    A folder that cannot be written only costs the time of packing.
    """

    def __init__(self, folder: str | None = None, limit_bytes: int | None = None) -> None:
        named = folder or os.environ.get("MOONLANG_PACKED_CACHE", "~/.cache/moonlang/packed")
        self.folder = Path(named).expanduser()
        limit_gb = float(os.environ.get("MOONLANG_PACKED_CACHE_GB", "32"))
        self.limit_bytes = int(limit_gb * 1e9) if limit_bytes is None else limit_bytes

    def pack(self, weights: Any, *, kind: str = "bf16", gated: bool = False, arena: Any = None) -> Any:
        """`sgl_kernel.pack` through the folder: the same weight, the same arguments, the same errors."""
        sources: list[Any] = list(weights) if isinstance(weights, list | tuple) else [weights]
        arena = arena if arena is not None else _C.Arena()
        path = self.folder / f"{content_key(sources, kind, gated)}.packed"
        rows = sum(int(source.shape[0]) for source in sources)
        found = self._read(path, kind, rows, int(sources[0].shape[1]), gated, arena)
        if found is not None:
            return found
        packed = _C.pack(sources, kind, gated, arena)
        self._write(path, packed)
        return packed

    def _read(self, path: Path, kind: str, n: int, k: int, gated: bool, arena: Any) -> Any:
        try:
            content = np.memmap(path, np.uint8, "r")
            os.utime(path)  # its turn to be deleted starts anew
        except (OSError, ValueError):  # absent, unreadable, or empty
            return None
        try:
            if content.size < _HEADER.size:
                raise ValueError("shorter than its header")
            magic, checksum = _HEADER.unpack(content[: _HEADER.size].tobytes())
            if magic != _MAGIC:
                raise ValueError("not a packed weight")
            return _C.restore(content[_HEADER.size :], checksum, kind, n, k, gated, arena)
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None

    def _write(self, path: Path, packed: Any) -> None:
        size = packed.bytes + _HEADER.size
        if size > self.limit_bytes:
            return
        memory = packed.memory()
        unfinished = path.with_suffix(f".{os.getpid()}.new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with unfinished.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, _C.block_checksum(memory)))
                file.write(memory.data)
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()

    def _make_room(self, size: int) -> None:
        """Delete what was unused for longest until `size` more bytes fit."""
        files = []
        for file in self.folder.iterdir():
            with suppress(OSError):  # another process may be deleting too
                stat = file.stat()
                files.append((stat.st_mtime_ns, stat.st_size, file))
        used = sum(file_size for _, file_size, _ in files)
        for _, file_size, file in sorted(files):
            if used + size <= self.limit_bytes:
                return
            with suppress(OSError):
                file.unlink()
            used -= file_size
