"""A store in the memory of this process: for tests, and for engines that live in one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from moonlang.base.units import parse_bytes
from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.storage.channel import Headers, StoreChannel, StoreOptions

_DEFAULT_CAPACITY = "1gb"


class MemoryStore:
    """Objects in a dictionary; the least recently used go first. capacity: bytes."""

    name = "memory"

    def __init__(self, capacity: int, objects: OrderedDict[str, bytes] | None = None) -> None:
        """objects: the dictionary, to be shared by several stores."""
        self._capacity = capacity
        self._objects = OrderedDict() if objects is None else objects
        self._pools: Sequence[Bytes]
        self._headers: Headers

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        self._pools, self._headers = pools, headers

    def leading(self, names: Sequence[str]) -> int:
        return next((i for i, name in enumerate(names) if name not in self._objects), len(names))

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            found = self._objects.get(name)
            if found is None or len(found) != self._size:
                return i
            with suppress(KeyError):  # it has gone meanwhile, and is still good
                self._objects.move_to_end(name)
            at = 0
            for part in (self._headers.read[i], *(pool[page] for pool in self._pools)):
                part[:] = np.frombuffer(found, np.uint8, len(part), at)
                at += len(part)
        return len(names)

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            if name not in self._objects:
                self._objects[name] = b"".join((self._headers.written[i], *(pool[page] for pool in self._pools)))
        while len(self._objects) * self._size > self._capacity and self._objects:
            self._objects.popitem(last=False)
        return len(names)

    def discard(self, names: Sequence[str]) -> None:
        for name in names:
            self._objects.pop(name, None)

    def clear(self, prefix: str) -> None:
        self.discard([name for name in list(self._objects) if name.startswith(prefix)])

    def close(self) -> None:
        pass

    @property
    def _size(self) -> int:
        """Bytes of an object."""
        return self._headers.read.shape[1] + sum(pool.shape[1] for pool in self._pools)


def open_store(options: StoreOptions) -> KvStore:
    """extra config: {"capacity": "4gb"}."""
    capacity = parse_bytes(options.extra.get("capacity", _DEFAULT_CAPACITY), "The capacity of the memory store")
    return StoreChannel(MemoryStore(capacity), options)


BACKEND = open_store
