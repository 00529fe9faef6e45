"""First contacts: is it there, does it answer, is it the one that was meant? In threads, since the wheel may hang.

A first contact with a process that is stopped takes a minute, under a lock that all calls of the engine need. So
another engine, a scout, goes first; one that hangs is left to itself. When it has come back the engine itself goes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from enum import Enum
from functools import partial
from typing import Final

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.mooncake.wheel import Wheel

MAX_PENDING: Final = 8  # contacts at a time: as many threads and scouts may hang
_LOOK_NS: Final = 20 * NS_PER_MS  # how often one who waits looks whether to go on


class Verdict(Enum):
    """What came of a contact; the value completes "the peer ..."."""

    MET = "is the one that was meant"
    GONE = "is gone"
    OTHER = "has been restarted"
    SILENT = "does not answer"


class Contacts:
    """Those of one engine. new_scout: makes an initialised engine."""

    def __init__(self, new_scout: Callable[[], Wheel]) -> None:
        self._new_scout = new_scout
        self._lock = threading.Lock()
        self._scouts: list[Wheel] = []  # idle ones
        self._pending: dict[str, Future[Verdict]] = {}

    def meet(
        self, name: str, address: int, tag: bytes, engine: Wheel, patience_ns: int, go_on: Callable[[], None]
    ) -> Verdict:
        """Read `tag` at `address` of the peer, by a scout and then by the engine; `go_on` may raise to end the wait."""
        deadline = monotonic_ns() + patience_ns
        future = self._begin(name, address, tag, engine)
        while not future.done():
            if monotonic_ns() >= deadline:
                return Verdict.SILENT
            wait([future], _LOOK_NS / NS_PER_S)
            go_on()
        return future.result()

    def close(self) -> None:
        with self._lock:
            self._scouts.clear()

    def _begin(self, name: str, address: int, tag: bytes, engine: Wheel) -> Future[Verdict]:
        key = f"{name}@{address}:{tag.hex()}"
        with self._lock:
            future = self._pending.get(key)
            if future is not None:  # it hangs still
                return future
            if len(self._pending) >= MAX_PENDING:
                raise PeerError(f"{MAX_PENDING} peers do not answer; {name} has to wait.")
            future = self._pending[key] = Future()
        arguments = (key, future, name, address, tag, engine)
        threading.Thread(target=self._go, args=arguments, name=f"meet-{name}", daemon=True).start()
        return future

    def _go(self, key: str, future: Future[Verdict], name: str, address: int, tag: bytes, engine: Wheel) -> None:
        try:
            verdict = self._scout_and_ask(name, address, tag, engine)
        except PeerError as error:
            outcome = partial(future.set_exception, error)
        else:
            outcome = partial(future.set_result, verdict)
        with self._lock:
            del self._pending[key]
        outcome()

    def _scout_and_ask(self, name: str, address: int, tag: bytes, engine: Wheel) -> Verdict:
        with self._lock:
            scout = self._scouts.pop() if self._scouts else None
        scout = scout or self._new_scout()
        verdict = _ask(scout, name, address, tag)
        if verdict is Verdict.MET:
            verdict = _ask(engine, name, address, tag)
        with self._lock:
            self._scouts.append(scout)
        return verdict


def _ask(wheel: Wheel, name: str, address: int, tag: bytes) -> Verdict:
    """Twice, since the first call after a restart fails on what the wheel remembers of the predecessor."""
    found = ctypes.create_string_buffer(len(tag))
    where = ctypes.addressof(found)
    wheel.register_memory(where, len(tag))
    try:
        for _ in range(2):
            if wheel.transfer_sync_read(name, where, address, len(tag)) == 0:
                return Verdict.MET if found.raw == tag else Verdict.OTHER
    finally:
        wheel.unregister_memory(where)
    return Verdict.GONE
