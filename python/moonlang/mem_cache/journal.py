"""Keeps what a prefix tree gains and loses until somebody takes it. Bounded: who does not, is told to begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moonlang.core.kv_events import DEVICE, AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hash
from moonlang.core.page_key import namespace, next_key

MAX_EVENTS: Final = 100_000


class Journal:
    """Of one RadixCache, which calls `stored` and `removed`."""

    def __init__(self, page_size: int, max_events: int = MAX_EVENTS) -> None:
        self._page_size = page_size
        self._max_events = max_events
        self._events: list[KvEvent] = []
        self._lost = False

    def stored(self, before: bytes | None, tokens: list[int], extra_key: str) -> list[bytes]:
        """The keys of the pages that hold `tokens`. before: the key of the page in front of them."""
        size = self._page_size
        keys: list[bytes] = []
        previous = namespace(extra_key) if before is None else before
        for at in range(0, len(tokens), size):
            previous = next_key(previous, tokens[at : at + size])
            keys.append(previous)
        parent = None if before is None else block_hash(before)
        self._add(BlockStored([block_hash(key) for key in keys], parent, tokens, size, medium=DEVICE))
        return keys

    def removed(self, keys: Sequence[bytes]) -> None:
        self._add(BlockRemoved([block_hash(key) for key in keys], medium=DEVICE))

    def take(self) -> list[KvEvent]:
        """All since the last time, in order."""
        found, self._events = self._events, []
        if self._lost:
            self._lost = False
            return [AllBlocksCleared()]
        return found

    def _add(self, event: KvEvent) -> None:
        """Some lost: whoever keeps an index has to forget all, and to miss what was stored before."""
        if self._lost:
            return
        self._events.append(event)
        if len(self._events) > self._max_events:
            self._events.clear()
            self._lost = True
