"""PagePool against a reference that keeps one owner per page in a dict, over random operations."""

from __future__ import annotations

import random

import pytest

from moonlang.base.errors import BugError
from moonlang.mem_cache.pool import Owner, PagePool


def some(rng: random.Random, pages: list[int]) -> list[int]:
    return rng.sample(pages, rng.randrange(len(pages) + 1))


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_agree_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(rng.choice((2, 9, 40)))
    owner = dict.fromkeys(range(1, pool.num_pages), Owner.FREE)
    pinned: dict[int, int] = {}  # page -> plan
    plan = 0

    def owned(by: Owner) -> list[int]:
        return [page for page, who in owner.items() if who == by]

    for _ in range(300):
        action = rng.choice(("take", "take", "adopt", "release", "quarantine", "retire", "complete"))
        if action == "take":
            pages = pool.take(rng.randrange(pool.free + 1))
            assert len(set(pages)) == len(pages)
            assert all(owner[page] == Owner.FREE for page in pages)
            owner.update(dict.fromkeys(pages, Owner.LEASED))
        elif action == "adopt":
            pages = some(rng, owned(Owner.LEASED))
            pool.adopt(pages)
            owner.update(dict.fromkeys(pages, Owner.CACHED))
        elif action == "release":
            who = rng.choice((Owner.LEASED, Owner.CACHED, Owner.QUARANTINED))
            pages = some(rng, owned(who))
            pool.release(pages, who)
            owner.update(dict.fromkeys(pages, Owner.FREE))
        elif action == "quarantine":
            pages = some(rng, owned(Owner.LEASED))
            pool.quarantine(pages)
            owner.update(dict.fromkeys(pages, Owner.QUARANTINED))
        elif action == "retire":
            pages = some(rng, owned(Owner.LEASED))
            waits_for = plan + rng.randrange(3)
            pool.retire(pages, waits_for)
            pinned.update(dict.fromkeys(pages, waits_for))
            owner.update(dict.fromkeys(pages, Owner.PINNED))
        else:
            pool.complete(plan)
            done = [page for page, waits_for in pinned.items() if waits_for <= plan]
            owner.update(dict.fromkeys(done, Owner.FREE))
            pinned = {page: waits_for for page, waits_for in pinned.items() if waits_for > plan}
            plan += 1
        pool.check()
        assert all(pool.owner(page) == who for page, who in owner.items())
        assert {who: pool.count(who) for who in Owner} == {who: len(owned(who)) for who in Owner}


def test_the_padding_page_is_never_handed_out() -> None:
    pool = PagePool(5)
    assert sorted(pool.take(pool.capacity)) == [1, 2, 3, 4]
    with pytest.raises(BugError, match="0 are free"):
        pool.take(1)
    with pytest.raises(BugError, match="at least 2"):
        PagePool(1)


def test_pages_are_given_back_by_their_owner_only_and_once() -> None:
    pool = PagePool(5)
    pages = pool.take(2)
    with pytest.raises(BugError, match="belongs to LEASED"):
        pool.release(pages, Owner.CACHED)
    pool.release(pages, Owner.LEASED)
    with pytest.raises(BugError, match="belongs to FREE"):
        pool.release(pages, Owner.LEASED)
    with pytest.raises(BugError, match="belongs to FREE"):
        pool.retire(pages, 1)
    with pytest.raises(BugError, match="Page 0"):
        pool.release([0], Owner.FREE)
