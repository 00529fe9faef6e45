"""RadixCache against a reference that knows only sets of prefixes, over random operations."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.eviction import ORDERS
from moonlang.mem_cache.pool import Owner, PagePool
from moonlang.mem_cache.radix import Node, RadixCache

Prefix = tuple[str, tuple[int, ...]]  # extra key, tokens: a whole number of pages


class Reference:
    """The page of every cached prefix, and how often each is locked."""

    def __init__(self, page_size: int) -> None:
        self.size = page_size
        self.page: dict[Prefix, int] = {}
        self.locks: dict[Prefix, int] = {}

    def prefixes(self, tokens: Sequence[int], key: str) -> list[Prefix]:
        whole = len(tokens) // self.size
        return [(key, tuple(tokens[: (i + 1) * self.size])) for i in range(whole)]

    def match(self, tokens: Sequence[int], key: str, limit: int) -> list[int]:
        pages: list[int] = []
        for prefix in self.prefixes(tokens[:limit], key):
            if prefix not in self.page:
                break
            pages.append(self.page[prefix])
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], key: str) -> list[int]:
        return [self.page.setdefault(p, page) for p, page in zip(self.prefixes(tokens, key), pages, strict=True)]

    def lock(self, tokens: Sequence[int], key: str, by: int) -> None:
        for prefix in self.prefixes(tokens, key):
            self.locks[prefix] = self.locks.get(prefix, 0) + by

    @property
    def evictable(self) -> int:
        return sum(self.locks.get(prefix, 0) == 0 for prefix in self.page)


class Twins:
    """A cache and its reference, driven by the same operations and compared after each."""

    def __init__(self, seed: int, page_size: int, order: str) -> None:
        self.rng = random.Random(seed)
        self.pool = PagePool(80)
        self.cache = RadixCache(self.pool, page_size, ORDERS[order])
        self.reference = Reference(page_size)
        self.held: list[tuple[PrefixRef, tuple[int, ...], str]] = []
        self.alphabet = self.rng.choice((1, 2, 4))

    def step(self) -> None:
        self.rng.choice((self.match, self.match, self.insert, self.insert, self.insert, self.unlock, self.evict))()
        self.compare()

    def tokens(self) -> tuple[int, ...]:
        length = self.rng.randrange(7 * self.reference.size)
        return tuple(self.rng.randrange(self.alphabet) for _ in range(length))

    def key(self) -> str:
        return self.rng.choice(("", "salt"))

    def match(self) -> None:
        tokens, key = self.tokens(), self.key()
        limit = self.rng.randrange(len(tokens) + 3)
        expected = self.reference.match(tokens, key, limit)
        assert self.cache.match_length(tokens, key, limit) == len(expected) * self.reference.size
        ref = self.cache.match(tokens, key, limit)
        assert (ref.tokens, self.cache.pages(ref)) == (len(expected) * self.reference.size, expected)
        self.lock(ref, tokens[: ref.tokens], key)

    def insert(self) -> None:
        tokens, key = self.tokens(), self.key()
        count = len(tokens) // self.reference.size
        tokens = tokens[: count * self.reference.size]
        if count > self.pool.free:
            return
        pages = self.pool.take(count)
        expected = self.reference.insert(tokens, pages, key)
        done = self.cache.insert(tokens, pages, key)
        assert done.pages == expected == self.cache.pages(done.ref)
        self.pool.release([page for page in pages if page not in expected], Owner.LEASED)
        self.lock(done.ref, tokens, key)

    def lock(self, ref: PrefixRef, tokens: tuple[int, ...], key: str) -> None:
        self.cache.lock(ref)
        self.reference.lock(tokens, key, 1)
        self.held.append((ref, tokens, key))
        if self.rng.random() < 0.7:
            self.unlock()

    def unlock(self) -> None:
        if self.held:
            ref, tokens, key = self.held.pop(self.rng.randrange(len(self.held)))
            self.cache.unlock(ref)
            self.reference.lock(tokens, key, -1)

    def evict(self) -> None:
        count, free = self.rng.randrange(1, 12), self.pool.free
        evictable = self.reference.evictable
        freed = self.cache.evict(count)
        assert self.pool.free == free + freed
        assert min(count, evictable) <= freed <= evictable
        left = {page for node in self.cache.nodes() for page in node.pages}
        gone = [prefix for prefix, page in self.reference.page.items() if page not in left]
        assert len(gone) == freed
        assert not any(self.reference.locks.get(prefix, 0) for prefix in gone)
        for prefix in gone:
            del self.reference.page[prefix]

    def compare(self) -> None:
        self.cache.check()
        self.pool.check()
        pages = sorted(page for node in self.cache.nodes() for page in node.pages)
        assert pages == sorted(self.reference.page.values())
        assert self.cache.evictable_pages == self.reference.evictable
        for ref, tokens, key in self.held:
            assert self.cache.pages(ref) == self.reference.match(tokens, key, len(tokens))


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_random_operations_agree_with_the_reference(page_size: int, order: str) -> None:
    for seed in range(12):
        twins = Twins(seed, page_size, order)
        for _ in range(120):
            twins.step()
        while twins.held:
            twins.unlock()
        assert twins.cache.evict(1000) == len(twins.reference.page)
        assert twins.pool.free == twins.pool.capacity
        assert not list(twins.cache.nodes())


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_what_is_evicted_ranks_lowest_among_unlocked_leaves(order: str) -> None:
    rank = {"lru": lambda n: n.used, "lfu": lambda n: (n.hits, n.used)}[order]
    for seed in range(12):
        twins = Twins(seed, 2, order)
        for _ in range(60):
            twins.step()
            leaves = [node for node in twins.cache.nodes() if not node.children and not node.locks]
            if not leaves:
                continue
            lowest: Node = min(leaves, key=rank)
            doomed = set(lowest.pages)
            assert twins.cache.evict(1) == len(doomed)
            assert doomed.isdisjoint(page for node in twins.cache.nodes() for page in node.pages)
            twins.reference.page = {p: page for p, page in twins.reference.page.items() if page not in doomed}


def test_roots_of_forgotten_keys_go_too() -> None:
    """A cache salt is chosen by users: one that holds nothing must cost nothing."""
    pool = PagePool(10)
    cache = RadixCache(pool, 1, ORDERS["lru"])
    for number in range(5):
        ref = cache.match([1, 2], f"salt {number}", 2)
        cache.lock(ref)
        done = cache.insert([1, 2], pool.take(2), f"salt {number}")
        cache.lock(done.ref)
        cache.unlock(ref)
        cache.unlock(done.ref)
        cache.evict(2)
    assert cache._roots == {}


def test_looking_changes_nothing() -> None:
    pool = PagePool(10)
    cache = RadixCache(pool, 2, ORDERS["lru"])
    cache.insert([1, 2, 3, 4], pool.take(2), "")
    (node,) = cache.nodes()
    used, hits = node.used, node.hits
    assert cache.locate([1, 2, 9, 9], "", 4) is node
    assert cache.locate([9, 9], "", 2) is cache.locate([1, 2], "unheard of", 2) is None
    assert cache.match_length([1, 2, 3, 4], "", 3) == 2
    assert (node.used, node.hits, list(cache.nodes()), list(cache._roots)) == (used, hits, [node], [""])
