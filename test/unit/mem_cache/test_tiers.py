"""Tiers against a simulated host pool and store: whatever they do, the tree holds the right bytes and nothing leaks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Demote, HostOp, Load, Probe, Promote, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.mem_cache.fetch import Fetch
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.mem_cache.tiers import Tiers

SIZE = 4
MS = 1_000_000


@dataclass
class World:
    """Device pages, host slots and a store as dictionaries of contents; a content is the key of the page."""

    config: TierConfig
    num_pages: int = 40
    store: dict[bytes, bytes] = field(default_factory=dict)
    now_ns: int = 0

    def __post_init__(self) -> None:
        self.leases = Leases(self.num_pages, SIZE, radix=True, eviction="lru")
        self.tiers = Tiers(self.config, self.leases)
        self.device: dict[int, bytes] = {}
        self.slots: dict[int, bytes] = {}
        self.under_way: list[tuple[int, HostOp | StoreOp]] = []

    def compute(self, tokens: list[int], extra_key: str = "") -> int:
        """What a request does: match, compute the rest, share, leave. Returns the tokens found in the cache."""
        keys = PageKeys(SIZE, extra_key)
        prefix = self.leases.cache.match(tokens, extra_key, len(tokens))
        lease = self.leases.open(prefix)
        found = prefix.tokens
        self.tiers.used(tokens, extra_key, keys, found // SIZE)
        if not self.leases.grow(lease, len(tokens)):
            self.leases.close(lease, None)
            return found
        whole = len(tokens) // SIZE
        for i, key in enumerate(keys.upto(tokens, whole)):
            if i >= found // SIZE:
                self.device[lease.pages[i]] = key
        begin = lease.shared
        self.leases.share(lease, tokens, whole * SIZE, extra_key, None)
        self.tiers.cached(tokens, extra_key, keys, begin, whole)
        self.leases.close(lease, None)
        return found

    def want(self, tokens: list[int], extra_key: str = "") -> Fetch | None:
        return self.tiers.want(tokens, extra_key, PageKeys(SIZE, extra_key), len(tokens), self.now_ns)

    def submit(self) -> None:
        self.under_way += self.tiers.ops(self.now_ns)

    def finish(self, index: int = 0, fail_from: int | None = None) -> None:
        """Carry out one op, its pages from `fail_from` on fail."""
        number, op = self.under_way.pop(index)
        count = self._carry_out(op, fail_from)
        short = fail_from is not None
        outcome = Outcome.FAILED if short and count == 0 else Outcome.OK
        self.tiers.completed(number, op, Completion(Ticket(number, "sim"), outcome, count), self.now_ns)

    def drain(self) -> None:
        for _ in range(1000):
            self.submit()
            if not self.under_way:
                return
            self.finish()
        raise AssertionError("the tiers never come to rest")

    def check(self) -> None:
        self.tiers.check()
        self.check_store()
        self.leases.check(self.tiers.leases, idle=False)
        cache = self.leases.cache
        assert isinstance(cache, RadixCache)
        for tokens, extra_key in cache.coldest(1 << 30):
            ref = cache.match(tokens, extra_key, len(tokens))
            keys = PageKeys(SIZE, extra_key).upto(tokens, len(tokens) // SIZE)
            assert [self.device[page] for page in cache.pages(ref)] == keys, "a page of the tree holds other bytes"

    def check_store(self) -> None:
        assert all(key == content for key, content in self.store.items()), "the store holds other bytes"

    def _carry_out(self, op: HostOp | StoreOp, fail_from: int | None) -> int:
        match op:
            case Demote():
                good = len(op.pages) if fail_from is None else min(fail_from, len(op.pages))
                for page, slot in zip(op.pages[:good], op.slots, strict=False):
                    self.slots[slot] = self.device[page]
            case Promote():
                good = len(op.pages) if fail_from is None else min(fail_from, len(op.pages))
                for i, (slot, page) in enumerate(zip(op.slots, op.pages, strict=True)):
                    self.device[page] = self.slots[slot] if i < good else b"rubbish"
            case Probe():
                present = [key in self.store for key in op.keys]
                good = present.index(False) if False in present else len(present)
                good = good if fail_from is None else 0
            case Load():
                good = 0
                for key, page in zip(op.keys, op.pages, strict=True):
                    self.device[page] = b"rubbish"
                    if good is not None and key in self.store and (fail_from is None or good < fail_from):
                        self.device[page] = self.store[key]
                        good += 1
                    else:
                        break
            case Save():
                good = len(op.keys) if fail_from is None else min(fail_from, len(op.keys))
                for key, page in zip(op.keys[:good], op.pages, strict=False):
                    self.store.setdefault(key, self.device[page])
            case _:
                raise AssertionError(op)
        return good


def prompt(seed: int, pages: int) -> list[int]:
    return [random.Random(seed).randrange(1000) for _ in range(pages * SIZE)]


def both(**changes: object) -> TierConfig:
    return TierConfig(**{"host_slots": 64, "store": True, "threshold_tokens": SIZE, "batch_pages": 8, **changes})  # type: ignore[arg-type]


def test_a_prefix_comes_back_from_the_host_after_eviction() -> None:
    world = World(both(store=False))
    world.compute(prompt(1, 6))
    world.drain()
    world.leases.cache.evict(100)
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == 0
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    assert world.tiers.is_holding(fetch, world.now_ns)
    world.drain()
    assert not world.tiers.is_holding(fetch, world.now_ns)
    world.check()
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == 6 * SIZE
    assert world.tiers.totals.host_tokens == 6 * SIZE


def test_another_instance_finds_it_in_the_store() -> None:
    first = World(both(host_slots=0))
    first.compute(prompt(1, 6))
    first.drain()
    second = World(both(), store=first.store)
    fetch = second.want(prompt(1, 6) + prompt(2, 2))
    assert fetch is not None
    second.drain()
    second.check()
    assert second.leases.cache.match_length(prompt(1, 6), "", 100) == 6 * SIZE
    assert second.tiers.host.leading(PageKeys(SIZE).upto(prompt(1, 6), 6)) == 6, "what was loaded is kept by the host"


def test_another_salt_finds_nothing() -> None:
    world = World(both())
    world.compute(prompt(1, 6), "mine")
    world.drain()
    world.leases.cache.evict(100)
    assert world.want(prompt(1, 6), "yours") is not None, "the store must be asked"
    world.drain()
    assert world.leases.cache.match_length(prompt(1, 6), "yours", 100) == 0


def test_an_absent_prefix_is_asked_for_once_in_a_while() -> None:
    world = World(both())
    world.want(prompt(1, 6))
    world.drain()
    assert world.want(prompt(1, 6)) is None
    assert world.tiers.totals.misses == {"absent": 2}
    world.now_ns += 2000 * MS
    assert world.want(prompt(1, 6)) is not None


@pytest.mark.parametrize("fail_from", [0, 2])
def test_a_failing_tier_shortens_the_match(fail_from: int) -> None:
    world = World(both(host_slots=0))
    world.compute(prompt(1, 6))
    world.drain()
    world.leases.cache.evict(100)
    world.want(prompt(1, 6))
    world.submit()
    world.finish()  # the probe
    world.submit()
    world.finish(fail_from=fail_from)
    world.drain()
    world.check()
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == fail_from * SIZE


def test_a_host_page_whose_checksum_fails_is_forgotten() -> None:
    world = World(both(store=False))
    world.compute(prompt(1, 4))
    world.drain()
    world.leases.cache.evict(100)
    world.want(prompt(1, 4))
    world.submit()
    world.finish(fail_from=1)
    keys = PageKeys(SIZE).upto(prompt(1, 4), 4)
    assert world.tiers.host.leading(keys) == 1
    world.check()


def test_selective_keeps_at_the_second_use() -> None:
    world = World(both(write_policy="write_through_selective"))
    world.compute(prompt(1, 4))
    world.drain()
    assert not world.store
    world.compute(prompt(1, 4))
    world.drain()
    assert len(world.store) == 4


def test_write_back_keeps_when_room_gets_short() -> None:
    world = World(both(write_policy="write_back"))
    world.compute(prompt(1, 4))
    world.tiers.tend(world.now_ns)
    world.drain()
    assert not world.store
    for seed in range(2, 11):
        world.compute(prompt(seed, 4))
        world.now_ns += 100 * MS
        world.tiers.tend(world.now_ns)
        world.drain()
    assert world.store


def test_write_back_hands_nothing_down_twice_while_nothing_is_computed() -> None:
    """Else an idle server would try the same pages for ever, when the store fails or the host pool is too small."""
    world = World(both(write_policy="write_back", host_slots=0))
    for seed in range(1, 11):
        world.compute(prompt(seed, 4))
    world.tiers.tend(world.now_ns)
    world.submit()
    assert world.under_way
    world.finish(fail_from=0)
    world.drain()
    world.now_ns += 1000 * MS
    world.tiers.tend(world.now_ns)
    world.submit()
    assert not world.under_way
    world.compute(prompt(20, 4))
    world.tiers.tend(world.now_ns)
    world.submit()
    assert world.under_way
    world.drain()


SLOW = both(host_slots=0, prefetch_policy="timeout")


def slow_world() -> World:
    """Computing takes 10 ms a token, 240 ms for the prompt that only the store has."""
    world = World(SLOW)
    world.tiers.computed(100, 1000 * MS)
    world.compute(prompt(1, 6))
    world.drain()
    world.leases.cache.evict(100)
    return world


def test_a_slow_store_is_not_waited_for_longer_than_computing_takes() -> None:
    world = slow_world()
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    world.submit()
    assert world.tiers.is_holding(fetch, world.now_ns), "it is asked"
    assert world.tiers.wake_ns(world.now_ns) == 20 * MS
    assert not world.tiers.is_holding(fetch, 20 * MS)
    assert world.tiers.origin(fetch, 0).miss == "slow", "whose request goes ahead now, gets nothing of it"
    assert world.tiers.wake_ns(20 * MS) is None, "a time that is over wakes nobody: the driver would spin"
    world.finish()
    world.submit()
    assert world.tiers.is_holding(fetch, 239 * MS), "it has it all, and nothing is known of its speed"
    assert not world.tiers.is_holding(fetch, 240 * MS)
    world.now_ns += 500 * MS
    world.finish()
    world.leases.cache.evict(100)
    scout = world.want(prompt(1, 6))
    assert scout is not None
    assert not world.tiers.is_holding(scout, world.now_ns), "it was slower than computing: it is tried, not waited for"
    assert world.want(prompt(1, 6)) is None
    assert world.tiers.unasked == "slow"
    assert world.tiers.totals.misses["slow"] == 1


def test_who_never_has_anything_is_asked_and_not_waited_for() -> None:
    """Until it has something once: prompts that share nothing should not pay for a store."""
    world = slow_world()
    world.tiers.computed(10_000, 10_000 * MS // 100)  # 0.1 ms a token: a look may take a fraction of a millisecond
    for seed in range(100, 130):
        world.want(prompt(seed, 6))
        world.submit()
        world.now_ns += MS
        world.finish()
    fetch = world.want(prompt(99, 6))
    assert fetch is not None, "it is asked"
    assert not world.tiers.is_holding(fetch, world.now_ns)
    world.drain()
    world.want(prompt(1, 6))  # the store has this one
    world.drain()
    fetch = world.want(prompt(98, 6))
    assert fetch is not None
    assert world.tiers.is_holding(fetch, world.now_ns)


def test_a_store_that_has_become_quick_is_waited_for_again() -> None:
    world = slow_world()
    for taken_ms in (5000, *[1] * 12):
        world.want(prompt(1, 6))
        while True:
            world.submit()
            if not world.under_way:
                break
            world.now_ns += taken_ms * MS
            world.finish()
        world.leases.cache.evict(100)
        world.now_ns += 1000 * MS
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    assert world.tiers.is_holding(fetch, world.now_ns)


def test_what_nobody_waits_for_is_not_read_further() -> None:
    first = World(both(host_slots=0, batch_pages=2))
    first.compute(prompt(1, 6))
    first.drain()
    world = World(both(host_slots=0, batch_pages=2), store=first.store)
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    for _ in range(2):  # the question, and a first batch
        world.submit()
        world.finish()
    world.check()
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == 2 * SIZE, "what has come is shared at once"
    world.submit()
    world.tiers.leave(fetch)
    world.drain()
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == 4 * SIZE
    world.leases.check([], idle=True)


def test_requests_get_the_memory_that_is_queued_to_go_down() -> None:
    world = World(both(host_slots=0, batch_pages=2), num_pages=17)
    world.compute(prompt(1, 6))
    world.submit()  # two pages are on their way, two more in the queue, two found it full
    lease = world.leases.open(world.leases.cache.match([], "", 0))
    assert world.leases.grow(lease, 10 * SIZE)
    assert not world.leases.grow(lease, 11 * SIZE), "what is being read stays, with all before it"
    assert world.leases.cache.match_length(prompt(1, 6), "", 100) == 6 * SIZE
    world.finish()
    world.check_store()
    assert world.leases.grow(lease, 16 * SIZE)
    world.leases.close(lease, None)
    world.drain()
    world.leases.check([], idle=True)
    assert len(world.store) == 2


def crowded() -> tuple[World, list[int]]:
    """A prompt that the lower tiers have, of which another one, on its way down, has taken most of the memory."""
    config = TierConfig(host_slots=64, store=True, batch_pages=4, threshold_tokens=SIZE)
    world = World(config, num_pages=25)
    first = prompt(1, 16)
    world.compute(first)
    world.drain()
    world.tiers.computed(100, 1000 * MS)  # 10 ms a token
    world.compute(prompt(2, 16))
    assert world.tiers.locks
    return world, first


def test_a_fetch_waits_for_what_is_on_its_way_down() -> None:
    """The request would take the memory for computing otherwise, and what goes down would come too late."""
    world, first = crowded()
    fetch = world.want(first)
    assert fetch is not None
    world.submit()
    assert not any(isinstance(op, Promote) for _, op in world.under_way)
    assert world.tiers.is_holding(fetch, world.now_ns)
    world.check()
    world.drain()
    world.check()
    assert world.compute(first) == len(first)
    stats = world.tiers.stats()
    assert (stats.total_waits, stats.total_dropped_tokens, stats.misses.get("memory", 0)) == (1, 0, 0)
    assert world.tiers.host.leading(PageKeys(SIZE).upto(prompt(2, 16), 16)) == 16


def test_a_wait_for_room_ends() -> None:
    """What is queued is put off then, and when that does not help the request computes."""
    world, first = crowded()
    fetch = world.want(first)
    assert fetch is not None
    world.submit()
    until_ns = world.tiers.wake_ns(world.now_ns)
    assert until_ns is not None
    assert not world.tiers.is_holding(fetch, until_ns)
    world.now_ns = until_ns
    world.submit()  # a batch to the host and one to the store are under way, and hold the path of their run
    assert not world.tiers.is_holding(fetch, world.now_ns)
    assert world.tiers.totals.misses["memory"] == 1
    assert not world.tiers.leases
    world.drain()
    world.check()
    assert world.tiers.host.leading(PageKeys(SIZE).upto(prompt(2, 16), 16)) == 16, "it has gone down later"


def test_running_requests_do_not_wait_for_those_that_wait_for_room() -> None:
    world, first = crowded()
    world.compute(first[: 4 * SIZE])
    fetch = world.want(first)
    assert fetch is not None
    world.submit()
    assert world.tiers.leases
    world.leases.call_in()
    assert not world.tiers.leases
    assert not world.tiers.is_holding(fetch, world.now_ns)
    world.check()


def test_a_load_waits_for_room_and_its_request_for_the_load() -> None:
    first = World(both(host_slots=0))
    first.compute(prompt(1, 8))
    first.drain()
    world = World(both(host_slots=0, batch_pages=4), num_pages=17, store=first.store)
    world.tiers.computed(100, 1000 * MS)
    fetch = world.want(prompt(1, 8))
    assert fetch is not None
    world.submit()
    world.compute(prompt(2, 10))
    world.submit()  # four of its pages are on their way, the others in the queue
    world.finish()  # the probe
    world.finish(index=0)
    assert world.tiers.is_holding(fetch, world.now_ns + 50 * MS)
    world.drain()
    world.check()
    assert world.compute(prompt(1, 8)) == 8 * SIZE


def test_what_is_put_off_goes_down_when_there_is_room() -> None:
    world = World(both(host_slots=0, batch_pages=2), num_pages=17)
    lease = world.leases.open(world.leases.cache.match([], "", 0))
    assert world.leases.grow(lease, 4 * SIZE)
    world.compute(prompt(1, 12))
    world.submit()
    world.leases.call_in()
    world.drain()
    assert len(world.store) == 2, "nobody locks pages while memory is short"
    world.leases.close(lease, None)
    world.drain()
    assert len(world.store) == 12
    assert not world.tiers.stats().total_dropped_tokens
    world.leases.check([], idle=True)


def test_what_is_put_off_and_evicted_counts_as_dropped() -> None:
    world = World(both(host_slots=0, batch_pages=2), num_pages=17)
    world.compute(prompt(1, 6))
    world.submit()
    world.leases.call_in()
    world.finish()
    world.leases.cache.evict(100)
    world.drain()
    assert len(world.store) == 2
    assert world.tiers.stats().total_dropped_tokens == 4 * SIZE


def test_the_first_load_is_not_measured_by_the_look_up_before_it() -> None:
    world = slow_world()
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    world.submit()
    world.now_ns += MS
    world.finish()
    world.submit()
    assert world.tiers.is_holding(fetch, 200 * MS), "a look-up takes a millisecond, computing 240"


def test_a_server_that_has_just_begun_waits_for_its_first_load() -> None:
    """Nothing is known of computing yet, and the first load connects to who has the pages."""
    first = World(both(host_slots=0))
    first.compute(prompt(1, 6))
    first.drain()
    world = World(SLOW, store=first.store)
    fetch = world.want(prompt(1, 6))
    assert fetch is not None
    world.submit()
    world.finish()
    world.submit()
    assert world.tiers.is_holding(fetch, 500 * MS)


def test_a_store_that_has_failed_is_told_everything_again() -> None:
    world = World(both(host_slots=0))
    world.compute(prompt(1, 4))
    world.drain()
    world.store.clear()  # its master was restarted
    world.want(prompt(2, 4))
    world.submit()
    world.finish(fail_from=0)
    world.leases.cache.evict(100)
    world.compute(prompt(1, 4))
    world.drain()
    assert len(world.store) == 4


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_and_no_failure_mixes_up_bytes(seed: int) -> None:
    """Random prompts over a small pool, ops that finish in any order and fail anywhere."""
    rng = random.Random(seed)
    policy = rng.choice(["write_through", "write_through_selective", "write_back"])
    world = World(both(host_slots=rng.choice([0, 5, 20]), write_policy=policy, store=rng.random() < 0.8))
    stems = [prompt(100 + i, 6) for i in range(4)]
    for _ in range(300):
        world.now_ns += rng.randrange(50 * MS)
        stem = rng.choice(stems)
        tokens = stem[: rng.randrange(1, len(stem))] + prompt(rng.randrange(30), 2)
        match rng.randrange(5):
            case 0:
                world.compute(tokens)
            case 1:
                world.want(tokens)
            case 2:
                world.tiers.tend(world.now_ns)
                world.submit()
            case 3 if world.under_way:
                world.finish(rng.randrange(len(world.under_way)), rng.choice([None, None, None, 0, 1, 2]))
            case 4 if rng.random() < 0.1:
                world.tiers.give_way()
            case 4:
                world.leases.cache.evict(rng.randrange(4))
                if rng.random() < 0.05:
                    world.store.clear()
        world.check()
    world.drain()
    world.leases.check([], idle=True)
    world.check()
