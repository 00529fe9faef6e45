"""Checksums of memory: XXH3-64. Against damage and mix-ups, not against an adversary."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import xxhash

METHOD = "xxh3-64"  # who compares checksums must take them alike


class Checksum:
    """Of a sequence of bytes, however it is cut into pieces. The interpreter lock is free while large ones are read."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)

    def add_memory(self, address: int, size: int) -> None:
        """The `size` bytes at `address` of this process."""
        self._hash.update((ctypes.c_char * size).from_address(address))

    def value(self) -> int:
        """Of everything added so far: in [0, 2**64)."""
        return self._hash.intdigest()


def of_memory(pieces: Iterable[tuple[int, int]]) -> int:
    """Checksum of (address, size) pieces of this process's memory, one after the other."""
    found = Checksum()
    for address, size in pieces:
        found.add_memory(address, size)
    return found.value()
