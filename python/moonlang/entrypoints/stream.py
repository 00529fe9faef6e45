"""The way of texts from the reader callback to the one consumer that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from moonlang.core.messages import TextDelta


class Stream:
    """What the sequences of one call say, as it arrives. For one consumer, which must `close` it (a `with` block does).

    It holds what the consumer has not taken yet: at most the whole output of its own sequences. forsake: called when it
    is closed before its sequences have ended.
    """

    __slots__ = ("_forsake", "_loop", "_ready", "_waiter", "_watcher", "closed", "open_count", "rids")

    def __init__(self, loop: asyncio.AbstractEventLoop, rids: list[str], forsake: Callable[[Stream], None]) -> None:
        self._loop = loop
        self._forsake = forsake
        self._watcher: asyncio.Task[None] | None = None
        self._ready: list[tuple[int, TextDelta]] = []
        self._waiter: asyncio.Future[None] | None = None
        self.rids = rids
        self.open_count = len(rids)
        self.closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """True when the last delta of every sequence has been taken."""
        return self.open_count == 0 and not self._ready

    async def next(self) -> list[tuple[int, TextDelta]]:
        """Everything that has come since the last call, as (index of the sequence, delta); waits for the first.

        Empty only after `close`, or when everything has been taken.
        """
        if not self._ready and self.open_count and not self.closed:
            self._waiter = self._loop.create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """Abort what still runs. Wakes a waiting consumer; may be called twice."""
        if self.closed:
            return
        self.closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        self._ready.clear()
        if self.open_count:
            self._forsake(self)
        self.wake()

    def close_after(self, gone: Coroutine[Any, Any, None]) -> None:
        """Close when `gone` returns; it is cancelled when the stream is closed before."""
        self._watcher = self._loop.create_task(gone)
        self._watcher.add_done_callback(lambda _: self.close())

    def put(self, index: int, delta: TextDelta) -> None:
        """Called by the client only."""
        self._ready.append((index, delta))
        if delta.finish is not None:
            self.open_count -= 1
        if self._waiter is not None:
            self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def merge(deltas: list[TextDelta]) -> TextDelta:
    """Several deltas of one sequence, in order, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return TextDelta(
        rid=last.rid,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish=last.finish,
        head=next((delta.head for delta in deltas if delta.head is not None), None),
        output=tuple(entry for delta in deltas for entry in delta.output),
        prompt=tuple(entry for delta in deltas for entry in delta.prompt),
        retractions=last.retractions,
    )
