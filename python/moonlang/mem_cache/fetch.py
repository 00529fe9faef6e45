"""Prefixes on their way up, and whether it pays: loading against computing, by the rates of both.

A request waits for its fetch no longer than computing the same tokens would take, and than the prefetch policy allows.
Where pages on their way down are in the way, it waits for them to arrive, for a fraction of that.
The store is read batch by batch, each shared into the tree as it arrives: when the request goes ahead, what has come is
used, nothing more is read, and a store that hangs holds the pages of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moonlang.core.lease import Lease
from moonlang.mem_cache.known import Known
from moonlang.mem_cache.rates import Rate
from moonlang.mem_cache.tier_settings import TierConfig

_MS = 1_000_000
_LOOK_SHARE = 20  # asking the store may delay a request by this fraction of what computing would take ...
_LOOK_NS = 20 * _MS  # ... or by so long, as long as answers usually come ...
_QUICK_NS = 5 * _MS  # ... within this time ...
_DRY_LOOKS = 24  # ... and unless so many answers in a row were that it has nothing
_NOVICE_NS = 100 * _MS  # and by so long when nothing is known of computing
_NOVICE_LOAD_NS = 1_000 * _MS  # a load is waited for so long then: the first one connects to who has the pages
_WORTH_NS = 20 * _MS  # a load that takes no longer is never called slow: tiny models compute in no time
_ROOM_SHARE = 4  # a request waits for room for what it loads this fraction of what computing would take
_LOAD_SLACK = 4  # a load is waited for so many times as long as it usually takes, or ...
_LOAD_SHARE = 4  # ... for this fraction of what computing would take: a busy machine has its hiccups
_SCOUT_NS = 1_000 * _MS  # a store that was too slow is tried so often, without anybody waiting for it ...
_SCOUT_PAGES = 8  # ... with so many pages


@dataclass(slots=True, eq=False)
class Fetch:
    """One prefix on its way up. Page indices count from the prompt's first page.

    at: the first page that the device lacked; host_end: the host has the pages before; end: the store those before.
    """

    tokens: list[int]
    extra_key: str
    keys: list[bytes]
    lease: Lease
    at: int
    host_end: int
    end: int
    patience_ns: int  # nobody waits for it after that
    reason: str = ""  # why the store brings nothing
    started_ns: int = 0
    is_scout: bool = False  # it is to show how quick the store is
    is_wanted: bool = True  # its request has not gone ahead
    host_good: int = 0
    store_good: int = 0
    held: int = 0  # pages that it has brought into the device pool, or is about to
    host_pending: bool = False
    store_pending: bool = False
    slots: tuple[int, ...] = ()  # of the host's part, for which it waits for room
    lacks: int = 0  # pages that it waits for room for ...
    waits_since_ns: int = 0  # ... from then on ...
    room_ns: int = 0  # ... until then

    @property
    def is_done(self) -> bool:
        return not (self.host_pending or self.store_pending or self.lacks)

    @property
    def good(self) -> int:
        """Pages of the prompt that are in place without a gap."""
        if self.at + self.host_good < self.host_end:
            return self.at + self.host_good
        return self.host_end + self.store_good


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the cached prefix of a request came from, in tokens; miss: why the store brought nothing."""

    host: int
    store: int
    miss: str


class Judge:
    """Decides what is worth its while."""

    def __init__(self, config: TierConfig, page_size: int) -> None:
        self._config = config
        self._page_size = page_size
        self._compute = Rate()  # per token
        self._from_host = Rate()  # per page, as the others
        self._from_store = Rate()
        self._lookup = Rate()  # per question
        self._in_vain = 0  # questions since it has had something
        self._scouted_ns = -_SCOUT_NS

    # ---- what things have taken

    def computed(self, tokens: int, ns: int) -> None:
        self._compute.sample(tokens, ns)

    def promoted(self, pages: int, ns: int) -> None:
        self._from_host.sample(pages, ns)

    def looked_up(self, pages: int, ns: int) -> None:
        """The store has said that it has so many pages."""
        self._lookup.sample(1, ns)
        self._in_vain = 0 if pages else self._in_vain + 1

    def loaded(self, pages: int, ns: int) -> None:
        """The round trip is not part of the rate: few pages would seem to take as long as many."""
        self._from_store.sample(max(1, pages), max(ns - self._lookup.estimate_ns(1), ns // 4))

    # ---- what to do

    def worth_promoting(self, pages: int) -> int:
        """`pages`, or 0 when computing them is quicker than copying them."""
        loading = self._from_host.estimate_ns(pages)
        if pages and loading > max(self._computing_ns(pages), _WORTH_NS):
            self._from_host.relent()
            return 0
        return pages

    def why_not_ask(self, names: Sequence[bytes], at: int, known: Known, now_ns: int) -> str:
        """Empty when the store is to be asked for the pages from `at` on."""
        pages = len(names) - at
        if pages == 0:
            return "complete"
        if pages * self._page_size < self._config.threshold_tokens:
            return "short"
        if known.is_absent(names[at], now_ns):
            return "absent"
        computing = self._computing_ns(pages) if self._config.prefetch_policy == "timeout" else 0
        if computing and self._loading_ns(pages) > max(computing, _WORTH_NS):
            return "slow"
        return ""

    def may_scout(self, now_ns: int) -> bool:
        """Whether a store that is too slow is to be tried again."""
        if now_ns - self._scouted_ns < _SCOUT_NS:
            return False
        self._scouted_ns = now_ns
        return True

    def look_patience_ns(self, pages: int) -> int:
        """How long a request may wait to hear whether the store has something for it."""
        policy, limit = self._config.prefetch_policy, self.limit_ns(pages)
        if policy == "best_effort":
            return 0
        if policy == "wait_complete":
            return limit
        computing, looking = self._computing_ns(pages), self._lookup.estimate_ns(1)
        if not computing:
            return min(limit, _NOVICE_NS)
        share = computing // _LOOK_SHARE
        is_dry = self._in_vain >= _DRY_LOOKS
        if looking > (share if is_dry else max(share, _QUICK_NS)):
            return 0  # it would wait in vain
        return min(limit, max(share, _LOOK_NS if looking <= _QUICK_NS and not is_dry else 0))

    def load_patience_ns(self, pages: int) -> int:
        """How long a request may wait for so many pages from the store."""
        limit = self.limit_ns(pages)
        if self._config.prefetch_policy != "timeout":
            return limit
        computing = self._computing_ns(pages)
        if not computing:
            return min(limit, _NOVICE_LOAD_NS)
        computing = max(computing, _WORTH_NS)
        if not self._from_store.estimate_ns(pages):  # look-ups say nothing of loads
            return min(limit, computing)
        return min(limit, computing, max(_LOAD_SLACK * self._loading_ns(pages), computing // _LOAD_SHARE))

    def room_patience_ns(self, pages: int) -> int:
        """How long a request may wait for room for so many pages, which others are about to leave."""
        policy, limit = self._config.prefetch_policy, self.limit_ns(pages)
        if policy == "wait_complete":
            return limit
        computing = self._computing_ns(pages)
        return min(limit, max(computing // _ROOM_SHARE, _WORTH_NS) if computing else _NOVICE_NS)

    def limit_ns(self, pages: int) -> int:
        """The longest that the flags allow."""
        return self._config.timeout_ns + self._config.timeout_ki_token_ns * pages * self._page_size // 1024

    def pages_at_once(self, fetch: Fetch) -> int:
        """How many pages the next read of the store may have."""
        return _SCOUT_PAGES if fetch.is_scout else self._config.batch_pages

    def _computing_ns(self, pages: int) -> int:
        return self._compute.estimate_ns(pages * self._page_size)

    def _loading_ns(self, pages: int) -> int:
        """Of it only the looking when no load has been measured."""
        reading = self._from_store.estimate_ns(pages)
        reads = 1 + -(-pages // self._config.batch_pages) if reading else 1
        return reading + self._lookup.estimate_ns(reads)
