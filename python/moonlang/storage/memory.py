"""A store in the memory of this process: for tests, and for engines that live in one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from moonlang.base.units import parse_bytes
from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.storage.channel import StoreChannel, StoreOptions

_DEFAULT_CAPACITY = "1gb"


class MemoryStore:
    """Objects in a dictionary; the least recently used go first. capacity: bytes."""

    name = "memory"

    def __init__(self, capacity: int, objects: OrderedDict[str, bytes] | None = None) -> None:
        """objects: the dictionary, to be shared by several stores."""
        self._capacity = capacity
        self._objects = OrderedDict() if objects is None else objects
        self._pool: Bytes
        self._headers: Bytes

    def attach(self, pool: Bytes, headers: Bytes) -> None:
        self._pool, self._headers = pool, headers

    def leading(self, names: Sequence[str]) -> int:
        return next((i for i, name in enumerate(names) if name not in self._objects), len(names))

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            found = self._objects.get(name)
            if found is None or len(found) != self._headers.shape[1] + self._pool.shape[1]:
                return i
            self._objects.move_to_end(name)
            split = self._headers.shape[1]
            self._headers[i] = np.frombuffer(found, np.uint8, split)
            self._pool[page] = np.frombuffer(found, np.uint8, offset=split)
        return len(names)

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            if name not in self._objects:
                self._objects[name] = self._headers[i].tobytes() + self._pool[page].tobytes()
        size = self._headers.shape[1] + self._pool.shape[1]
        while len(self._objects) * size > self._capacity and self._objects:
            self._objects.popitem(last=False)
        return len(names)

    def discard(self, names: Sequence[str]) -> None:
        for name in names:
            self._objects.pop(name, None)

    def clear(self, prefix: str) -> None:
        for name in [name for name in self._objects if name.startswith(prefix)]:
            del self._objects[name]

    def close(self) -> None:
        pass


def open_store(options: StoreOptions) -> KvStore:
    """extra config: {"capacity": "4gb"}."""
    capacity = parse_bytes(options.extra.get("capacity", _DEFAULT_CAPACITY), "The capacity of the memory store")
    return StoreChannel(MemoryStore(capacity), options)


BACKEND = open_store
