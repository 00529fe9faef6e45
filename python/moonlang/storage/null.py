"""A store that keeps nothing: what the tiers cost when the store never helps."""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.storage.channel import Headers, StoreChannel, StoreOptions


class NullStore:
    """Takes everything and has nothing."""

    name = "null"

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        pass

    def leading(self, names: Sequence[str]) -> int:
        return 0

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        return 0

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        return len(names)

    def discard(self, names: Sequence[str]) -> None:
        pass

    def clear(self, prefix: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_store(options: StoreOptions) -> KvStore:
    return StoreChannel(NullStore(), options)


BACKEND = open_store
