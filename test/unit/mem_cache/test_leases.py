"""What becomes of the pages of a lease when others look at them or write to them."""

from __future__ import annotations

import pytest

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.pool import Owner


def memory(pages: int = 9) -> Leases:
    return Leases(pages + 1, 4, radix=True, eviction="lru")


def lease(leases: Leases, tokens: list[int]) -> Lease:
    found = leases.open(leases.cache.match(tokens, "", len(tokens)))
    assert leases.grow(found, len(tokens))
    return found


TOKENS = list(range(12))


def test_a_lent_page_is_not_exchanged_for_the_trees() -> None:
    leases = memory()
    first, second = lease(leases, TOKENS), lease(leases, TOKENS)
    mine, second.lent = list(second.pages), True
    leases.share(first, TOKENS, 8, "", None)
    assert leases.share(second, TOKENS, 8, "", None) == 3
    assert (second.pages, second.shared) == (mine, 0)
    leases.check([first, second], idle=False)
    second.lent = False
    assert leases.share(second, TOKENS, 12, "", None) == 0
    assert second.pages == [*first.pages[:2], mine[2]]
    assert leases.pool.free == 9 - 6 + 2
    for each in (first, second):
        leases.close(each, None)
    leases.check([], idle=True)


def test_a_lent_page_that_nobody_else_has_goes_into_the_tree() -> None:
    leases = memory()
    only = lease(leases, TOKENS)
    mine, only.lent = list(only.pages), True
    assert leases.share(only, TOKENS, 12, "", None) == 3
    assert (only.pages, only.shared) == (mine, 3)
    leases.close(only, None)
    leases.check([], idle=True)


def test_quarantined_pages_belong_to_nobody_until_they_are_acquitted() -> None:
    leases = memory()
    cached = lease(leases, TOKENS)
    leases.share(cached, TOKENS, 8, "", None)
    leases.close(cached, None)
    landing = lease(leases, [*range(8), 50, 51, 52, 53, 54])
    own = landing.pages[2:]
    assert leases.quarantine(landing) == own
    leases.check([], idle=True)
    assert leases.pool.count(Owner.QUARANTINED) == 2
    assert leases.available_pages == 7  # the cached prefix can be evicted again
    assert leases.coming_pages == 7  # no plan brings back what is in quarantine
    other = leases.open(leases.cache.match([], "", 0))
    assert not leases.grow(other, 8 * 4)
    assert leases.grow(other, 7 * 4)
    assert not set(own) & set(other.pages)
    leases.close(other, None)
    leases.acquit(own)
    leases.check([], idle=True)
    assert leases.available_pages == 9
    with pytest.raises(BugError, match="belongs to FREE"):
        leases.acquit(own)
