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


@pytest.mark.parametrize("settled", [False, True])
def test_a_lent_page_that_leaves_the_page_table_stays_until_no_transfer_reads_it(settled: bool) -> None:
    for lent in (False, True):
        leases = memory()
        first, second = lease(leases, TOKENS), lease(leases, TOKENS)
        second.lent = lent
        mine = list(second.pages)
        leases.share(first, TOKENS, 8, "", None)
        assert leases.share(second, TOKENS, 8, "", None) == 0
        assert second.spare == (mine[:2] if lent else [])
        assert leases.pool.free == 9 - 6 + (0 if lent else 2)
        leases.check([first, second], idle=False)
        if settled:
            leases.settle(second, None)
            assert leases.pool.free == 9 - 6 + 2
        leases.close(second, None)
        leases.check([first], idle=False)
        leases.close(first, None)
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
