"""Stateful fuzz of the page ledger: pool, tree, leases and lower tiers under random operations, without a scheduler.

    python -m moonlang.sim.tiers.fuzz [operations] [--seed N]

After every operation the owners must sum to the pool; every so often everything is counted anew, and every page of the
tree must hold what its key says.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, field

from moonlang.core.lease import Lease
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Demote, HostOp, Load, Probe, Promote, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.pool import Owner
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.mem_cache.tiers import Tiers
from moonlang.sim.violation import Violation

_NAME = "ledger"
_SIZE = 2  # tokens per page
_PAGES = (20, 48)
_FULL_CHECK = 64  # operations
_MOST_OPEN = 6  # leases
_LONGEST = 12  # pages
_MOST_LEFT = 500  # ops until everything has ended


@dataclass(slots=True)
class _Running:
    """A lease with the tokens that it is for."""

    lease: Lease
    tokens: list[int]
    extra_key: str
    keys: PageKeys
    computed: int = 0  # pages


@dataclass(slots=True)
class Fuzz:
    """All state, and one method per kind of operation. A page's content is its key."""

    seed: int
    rng: random.Random = field(init=False)
    leases: Leases = field(init=False)
    tiers: Tiers = field(init=False)
    device: dict[int, bytes] = field(default_factory=dict)
    slots: dict[int, bytes] = field(default_factory=dict)
    store: dict[bytes, bytes] = field(default_factory=dict)
    running: list[_Running] = field(default_factory=list)
    under_way: list[tuple[int, HostOp | StoreOp]] = field(default_factory=list)
    quarantined: list[list[int]] = field(default_factory=list)
    plan: int = 0
    completed: int = 0
    now_ns: int = 0
    longest_ns: int = field(init=False)  # between two operations
    failures: float = field(init=False)  # the share of ops that do not end as a whole

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.longest_ns = self.rng.choice((3_000_000, 30_000_000))
        self.failures = self.rng.choice((0.02, 0.2))
        pages, eviction = self.rng.choice(_PAGES), self.rng.choice(("lru", "lfu"))
        self.leases = Leases(pages, _SIZE, radix=True, eviction=eviction)
        policy = self.rng.choice(("write_through", "write_through_selective", "write_back"))
        config = TierConfig(host_slots=24, store=True, threshold_tokens=_SIZE, batch_pages=4, write_policy=policy)
        self.tiers = Tiers(config, self.leases)

    def run(self, operations: int) -> None:
        """Violation or BugError at the first thing that is wrong."""
        kinds = (self.begin, self.compute, self.end, self.want, self.submit, self.finish, self.other)
        for step in range(operations):
            self.now_ns += self.rng.randrange(self.longest_ns)
            self.rng.choice(kinds)()
            pool = self.leases.pool
            if sum(map(pool.count, Owner)) != pool.capacity:
                raise Violation(_NAME, f"operation {step}: the owners do not sum to the pool")
            if step % _FULL_CHECK == 0:
                self.check()
        self.drain()

    # ---- operations

    def begin(self) -> None:
        """A request is admitted."""
        if len(self.running) == _MOST_OPEN:
            return
        tokens, extra_key, keys = self._prompt()
        prefix = self.leases.cache.match(tokens, extra_key, len(tokens))
        self.tiers.used(tokens, extra_key, keys, prefix.tokens // _SIZE)
        lease = self.leases.open(prefix)
        self.running.append(_Running(lease, tokens, extra_key, keys, prefix.tokens // _SIZE))

    def compute(self) -> None:
        """A request computes some pages, and shares them."""
        if not self.running:
            return
        one = self.rng.choice(self.running)
        end = min(len(one.tokens) // _SIZE, one.computed + self.rng.randrange(1, 5))
        if not self.leases.grow(one.lease, end * _SIZE):
            return
        self.plan += 1
        for i, key in enumerate(one.keys.upto(one.tokens, end)):
            if i >= one.computed:
                self.device[one.lease.pages[i]] = key
        one.computed = end
        before = one.lease.shared
        self.leases.share(one.lease, one.tokens, end * _SIZE, one.extra_key, self.plan)
        self.tiers.cached(one.tokens, one.extra_key, one.keys, before, one.lease.shared)

    def end(self) -> None:
        """A request ends, perhaps with a plan in flight, perhaps with a peer that may still write."""
        if not self.running:
            return
        one = self.running.pop(self.rng.randrange(len(self.running)))
        if self.rng.random() < 0.1:
            self.quarantined.append(self.leases.quarantine(one.lease))
        else:
            self.leases.close(one.lease, self.rng.choice((None, self.plan)))

    def want(self) -> None:
        tokens, extra_key, keys = self._prompt()
        fetch = self.tiers.want(tokens, extra_key, keys, len(tokens), self.now_ns)
        if fetch is not None and self.rng.random() < 0.3:
            self.tiers.leave(fetch)

    def submit(self) -> None:
        self.tiers.tend(self.now_ns)
        for number, op in self.tiers.ops(self.now_ns):
            if isinstance(op, Promote | Load):
                self.device |= dict.fromkeys(op.pages, b"rubbish")
            self.under_way.append((number, op))

    def finish(self) -> None:
        """One op ends, as a whole, in part or not at all."""
        if not self.under_way:
            return
        number, op = self.under_way.pop(self.rng.randrange(len(self.under_way)))
        size = len(op.pages) if not isinstance(op, Probe) else len(op.keys)  # type: ignore[union-attr]
        good = size if self.rng.random() >= self.failures else self.rng.randrange(size + 1)
        count = self._carry_out(op, good)
        failed = not count and good < size and self.rng.random() < 0.5
        outcome = Outcome.FAILED if failed else Outcome.OK
        self.tiers.completed(number, op, Completion(Ticket(number, _NAME), outcome, count), self.now_ns)

    def other(self) -> None:
        """What happens now and then."""
        match self.rng.randrange(6):
            case 0:
                self.leases.cache.evict(self.rng.randrange(8))
            case 1:
                self.tiers.give_way()
            case 2:
                self.completed = self.rng.randint(self.completed, self.plan)
                self.leases.pool.complete(self.completed)
            case 3 if self.quarantined:
                self.leases.acquit(self.quarantined.pop())
            case 4 if self.rng.random() < 0.05:
                self.store.clear()
            case _ if self.rng.random() < 0.05:
                self.tiers.forget()

    # ---- what must hold

    def check(self) -> None:
        self.leases.check([one.lease for one in self.running] + self.tiers.leases, idle=False)
        self.tiers.check()
        cache = self.leases.cache
        assert isinstance(cache, RadixCache)
        for tokens, extra_key in cache.coldest(self.leases.pool.num_pages):
            pages = cache.pages(cache.match(tokens, extra_key, len(tokens)))
            if [self.device[page] for page in pages] != PageKeys(_SIZE, extra_key).upto(tokens, len(tokens) // _SIZE):
                raise Violation(_NAME, "a page of the tree holds what is not its own")
        if any(key != content for key, content in self.store.items()):
            raise Violation(_NAME, "an object of the store holds what is not its own")

    def drain(self) -> None:
        """Everything ends; every page comes back."""
        while self.running:
            self.end()
        for _ in range(_MOST_LEFT):
            self.submit()
            if not self.tiers.is_busy:
                break
            self.now_ns += 10_000_000  # who waits for room gives up in the end
            self.finish()
        else:
            raise Violation(_NAME, "the tiers never come to rest")
        for pages in self.quarantined:
            self.leases.acquit(pages)
        self.leases.pool.complete(self.plan)
        self.check()
        self.leases.check([], idle=True)
        self.leases.cache.evict(self.leases.pool.num_pages)
        if self.leases.pool.free != self.leases.pool.capacity:
            raise Violation(_NAME, "pages are lost")

    # ---- inside

    def _prompt(self) -> tuple[list[int], str, PageKeys]:
        """One of few stems with one of few ends, so that much is shared."""
        stem, cut = random.Random(self.rng.randrange(4)), self.rng.randrange(1, _LONGEST)
        tokens = [stem.randrange(100) for _ in range(cut * _SIZE)]
        tokens += [self.rng.randrange(3)] * (self.rng.randrange(0, _LONGEST - cut + 1) * _SIZE)
        extra_key = self.rng.choice(("", "", "salt"))
        return tokens, extra_key, PageKeys(_SIZE, extra_key)

    def _carry_out(self, op: HostOp | StoreOp, good: int) -> int:
        match op:
            case Demote():
                for page, slot in zip(op.pages[:good], op.slots, strict=False):
                    self.slots[slot] = self.device[page]
            case Promote():
                for slot, page in zip(op.slots[:good], op.pages, strict=False):
                    self.device[page] = self.slots[slot]
            case Save():
                for key, page in zip(op.keys[:good], op.pages, strict=False):
                    self.store.setdefault(key, self.device[page])
            case Probe():
                return min(good, self._leading(op.keys))
            case Load():
                good = min(good, self._leading(op.keys))
                for key, page in zip(op.keys[:good], op.pages, strict=False):
                    self.device[page] = self.store[key]
            case _:
                raise Violation(_NAME, f"nobody asks for {op}")
        return good

    def _leading(self, keys: tuple[bytes, ...]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.store), len(keys))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    part = 10_000  # operations under one configuration
    for at in range(0, args.operations, part):
        Fuzz(args.seed + at // part).run(min(part, args.operations - at))
    sys.stdout.write(f"{args.operations} operations, owners always summed to the pool\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
