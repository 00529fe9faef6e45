"""Whoever follows the journal knows what the tree holds, whatever happened to it."""

from __future__ import annotations

import random

from moonlang.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hash
from moonlang.core.page_key import PageKeys
from moonlang.mem_cache.eviction import ORDERS
from moonlang.mem_cache.journal import Journal
from moonlang.mem_cache.pool import Owner, PagePool
from moonlang.mem_cache.radix import RadixCache

SIZE = 4


class Follower:
    """An index of hashes, as a router keeps it."""

    def __init__(self) -> None:
        self.parents: dict[int, int | None] = {}
        self.tokens: dict[int, list[int]] = {}

    def hear(self, events: list[KvEvent]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                assert parent is None or parent in self.parents
                for index, block in enumerate(event.block_hashes):
                    assert block not in self.parents
                    self.parents[block] = parent
                    self.tokens[block] = event.token_ids[index * SIZE : (index + 1) * SIZE]
                    parent = block
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del self.parents[block], self.tokens[block]
            else:
                self.parents.clear()
                self.tokens.clear()


def held(cache: RadixCache) -> set[int]:
    """Hashes of all pages in the tree, computed from its tokens alone."""
    found: set[int] = set()
    for node in cache.nodes():
        runs, above = [], node
        while above is not None:
            runs.append(above.tokens)
            above = above.parent
        tokens = [token for run in reversed(runs) for token in run]
        found |= {block_hash(key) for key in PageKeys(SIZE, node.extra_key).upto(tokens, len(tokens) // SIZE)}
    return found


def test_a_follower_knows_what_the_tree_holds() -> None:
    pool = PagePool(200)
    cache = RadixCache(pool, SIZE, ORDERS["lru"])
    journal = cache.journal = Journal(SIZE)
    follower, draw = Follower(), random.Random(1)
    for _ in range(600):
        tokens = [draw.randrange(2) for _ in range(SIZE * draw.randrange(1, 8))]
        pages = len(tokens) // SIZE
        if pool.free < pages:
            cache.evict(draw.randrange(1, 40))
        if pool.free >= pages:
            taken = pool.take(pages)
            kept = cache.insert(tokens, taken, draw.choice(("", "salt"))).pages
            pool.release([page for page, own in zip(taken, kept, strict=True) if page != own], Owner.LEASED)
        if draw.random() < 0.5:
            follower.hear(journal.take())
            assert set(follower.parents) == held(cache)
    cache.evict(200)
    follower.hear(journal.take())
    assert follower.parents == {}


def test_who_takes_nothing_is_told_to_forget() -> None:
    journal = Journal(SIZE, max_events=3)
    for _ in range(10):
        journal.stored(None, [1, 2, 3, 4], "")
    assert journal.take() == [AllBlocksCleared()]
    journal.stored(None, [1, 2, 3, 4], "")
    assert len(journal.take()) == 1
    assert journal.take() == []


def test_the_hash_is_the_one_that_others_compute() -> None:
    (key,) = Journal(SIZE).stored(None, [1, 2, 3, 4], "")
    assert key.hex()[:16] == "cf97adeedb59e05b"
    assert block_hash(bytes.fromhex("ff" * 32)) == -1
