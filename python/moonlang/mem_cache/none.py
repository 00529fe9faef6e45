"""The cache that remembers nothing (--disable-radix-cache): every prefix is empty, every page stays with its lease."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.radix import Inserted, Node


class NoCache:
    """PrefixCache without a tree."""

    evictable_pages = 0
    num_nodes = 0
    clock = 0
    _nothing = PrefixRef(None, 0)

    @property
    def roots(self) -> list[Node]:
        return []

    def match_length(self, tokens: Sequence[int], extra_key: str, limit: int) -> int:
        return 0

    def locate(self, tokens: Sequence[int], extra_key: str, limit: int) -> Node | None:
        return None

    def match(self, tokens: Sequence[int], extra_key: str, limit: int) -> PrefixRef:
        return self._nothing

    def pages(self, ref: PrefixRef) -> list[int]:
        return []

    def lock(self, ref: PrefixRef) -> None:
        pass

    def unlock(self, ref: PrefixRef) -> None:
        pass

    def insert(self, tokens: Sequence[int], pages: Sequence[int], extra_key: str) -> Inserted:
        """Holds none of them: the caller keeps its pages."""
        return Inserted(self._nothing, [])

    def evict(self, count: int) -> int:
        return 0

    def nodes(self) -> Iterator[Node]:
        return iter(())

    def check(self) -> None:
        pass
