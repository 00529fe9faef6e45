"""A wheel without a library: engines of one process that write into each other's registered memory, and can misbehave.

It is as unforgiving as the real one: what would be a segmentation fault there is a BugError here.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from moonlang.base.errors import BugError
from moonlang.mooncake.wheel import DONE, FAILED, PENDING

QUEUE: Final = 2048  # entries of one engine that may be pending

_REFUSED = -1


@dataclass(slots=True)
class FakeNetwork:
    """Where fake engines meet. checks: how often a write is PENDING before it ends.

    gone: names that refuse. stopped: names that never answer while they are in it; `resume` wakes who waits for them.
    failures: outcomes of the next writes that end, taken one by one; without any they succeed.
    """

    checks: int = 2
    engines: dict[str, FakeWheel] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)
    failures: deque[int] = field(default_factory=deque)
    written: list[int] = field(default_factory=list)  # sizes of the writes that arrived, in order
    ports: itertools.count[int] = field(default_factory=lambda: itertools.count(15000))
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def resume(self, name: str) -> None:
        """Let a stopped engine answer again."""
        with self._changed:
            self.stopped.discard(name)
            self._changed.notify_all()

    def hang(self, name: str) -> None:
        """Wait while `name` is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self.stopped)


@dataclass(slots=True)
class _Write:
    peer: str
    source: int
    target: int
    size: int
    checks: int


class FakeWheel:
    """See wheel.Wheel. initialises: what `initialize` returns."""

    def __init__(self, network: FakeNetwork, *, initialises: int = 0) -> None:
        self.name = ""
        self.most_pending = 0
        self._network = network
        self._initialises = initialises
        self._port = 0
        self._regions: dict[int, int] = {}
        self._pending: dict[int, _Write] = {}
        self._handles = itertools.count(1)
        self._meeting = threading.Lock()  # of all calls that need to know a peer

    def initialize(self, local_name: str, metadata_server: str, protocol: str, device_name: str, /) -> int:
        if self._initialises == 0:
            self._port = next(self._network.ports)
            p2p = metadata_server == "P2PHANDSHAKE"
            self.name = f"{local_name}:{self._port}" if p2p else local_name
            self._network.engines[self.name] = self
        return self._initialises

    def get_rpc_port(self) -> int:
        self._check()
        return self._port

    def register_memory(self, address: int, size: int, /) -> int:
        self._check()
        self._regions[address] = size
        return 0

    def unregister_memory(self, address: int, /) -> int:
        self._check()
        return 0 if self._regions.pop(address, None) is not None else -3

    def transfer_sync_read(self, peer: str, local: int, remote: int, size: int, /) -> int:
        self._check()
        with self._meeting:
            self._network.hang(peer)
        if not self._reaches(peer, remote, size):
            return _REFUSED
        ctypes.memmove(local, remote, size)
        return 0

    def transfer_submit_write(self, peer: str, local: int, remote: int, size: int, /) -> int:
        self._check()
        with self._meeting:
            if peer not in self._network.engines or len(self._pending) >= QUEUE:
                return 0
        handle = next(self._handles)
        self._pending[handle] = _Write(peer, local, remote, size, self._network.checks)
        self.most_pending = max(self.most_pending, len(self._pending))
        return handle

    def transfer_check_status(self, handle: int, /) -> int:
        self._check()
        write = self._pending.get(handle)
        if write is None:
            raise BugError("Asked for a handle that is free: a segmentation fault.")
        if write.checks > 0 or write.peer in self._network.stopped:
            write.checks -= 1
            return PENDING
        outcome = self._network.failures.popleft() if self._network.failures else DONE
        if outcome not in (DONE, FAILED):
            return outcome
        del self._pending[handle]
        if outcome == FAILED or not self._reaches(write.peer, write.target, write.size):
            return FAILED
        ctypes.memmove(write.target, write.source, write.size)
        self._network.written.append(write.size)
        return DONE

    @property
    def pending(self) -> int:
        """Writes under way."""
        return len(self._pending)

    def _reaches(self, peer: str, address: int, size: int) -> bool:
        other = self._network.engines.get(peer)
        if other is None or peer in self._network.gone:
            return False
        return any(start <= address and address + size <= start + length for start, length in other._regions.items())

    def _check(self) -> None:
        if not self._port:
            raise BugError("Called before `initialize`: a segmentation fault.")
