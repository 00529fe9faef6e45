"""Servers with lower tiers in virtual time, the fuzz of the page ledger, and that both find what is broken."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from moonlang.base.errors import BugError
from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.fetch import Fetch
from moonlang.mem_cache.host import HostDirectory
from moonlang.mem_cache.keeper import Keeper, Kept, Run
from moonlang.mem_cache.tiers import Tiers
from moonlang.sim.run import draw_case, run
from moonlang.sim.tiers.fuzz import Fuzz
from moonlang.sim.tiers.workload import draw
from moonlang.sim.tiers.world import TierWorld
from moonlang.sim.violation import Violation

SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_weather_and_no_restart_brings_wrong_tokens(seed: int) -> None:
    outcome = run(draw_case(seed, "tiers"), again=seed % 8 == 0)
    assert outcome.failure is None


def test_the_cases_move_pages_through_every_tier() -> None:
    host = store = misses = waits = 0
    for seed in range(12):
        world = TierWorld(draw(seed), list)
        world.run()
        for server in world.servers:
            totals = server.tiers.totals
            host += totals.host_tokens
            store += totals.store_tokens
            misses += totals.misses.get("failed", 0)
            waits += totals.waits
    assert min(host, store) > 100, (host, store)
    assert min(misses, waits) > 10, (misses, waits)


def test_the_ledger_adds_up() -> None:
    waits = denials = 0
    for seed in range(8):
        fuzz = Fuzz(seed)
        fuzz.run(2000)
        waits += fuzz.tiers.totals.waits
        denials += fuzz.tiers.totals.misses.get("memory", 0)
    assert min(waits, denials) > 20, (waits, denials)


def _keep_without_lock(patch: pytest.MonkeyPatch) -> None:
    """Pages on their way down may be given to others."""
    keep = Keeper.add

    def add(self: Keeper, ref: PrefixRef, pages: Sequence[Kept], run: Run) -> None:
        queued = len(self._queue)
        keep(self, ref, pages, run)
        if len(self._queue) > queued:
            self._queue = deque(replace(kept, ref=None) for kept in self._queue)
            self._cache.unlock(ref)

    patch.setattr(Keeper, "add", add)


def _believe_what_did_not_come(patch: pytest.MonkeyPatch) -> None:
    """A load that ended early is taken for whole."""
    patch.setattr(Fetch, "good", property(lambda self: self.host_end + self.store_good + 1))


def _forget_cut_runs(patch: pytest.MonkeyPatch) -> None:
    """Whoever lets go of a queue unlocks the batch under way with it."""

    def give_way(self: Keeper) -> None:
        for kept in self._queue:
            self._keys.discard(kept.key)
            if kept.ref is not None:
                self._cache.unlock(kept.ref)
        self._queue.clear()

    patch.setattr(Keeper, "give_way", give_way)


def _evict_what_is_read(patch: pytest.MonkeyPatch) -> None:
    """Slots of host memory are taken away from their readers."""

    def pin(self: HostDirectory, keys: list[bytes]) -> tuple[int, ...]:
        return tuple(self._entries[key].slot for key in keys)

    patch.setattr(HostDirectory, "pin", pin)
    patch.setattr(HostDirectory, "unpin", lambda self, keys: None)


def _forget_who_waits(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether there is room by now."""
    patch.setattr(Tiers, "_look_for_room", lambda self, now_ns: None)


def _give_up_with_pins(patch: pytest.MonkeyPatch) -> None:
    """Slots of host memory stay pinned for a fetch that found no room."""
    deny = Tiers._deny

    def keep_pins(self: Tiers, fetch: Fetch) -> None:
        fetch.slots, fetch.host_pending = (), False
        deny(self, fetch)

    patch.setattr(Tiers, "_deny", keep_pins)


def _leave_without_lease(patch: pytest.MonkeyPatch) -> None:
    """A fetch that waits for room is forgotten when memory is needed."""
    give_way = Tiers.give_way

    def forget(self: Tiers) -> None:
        self._waiting.clear()
        give_way(self)

    patch.setattr(Tiers, "give_way", forget)


MUTANTS = [
    _keep_without_lock,
    _believe_what_did_not_come,
    _forget_cut_runs,
    _evict_what_is_read,
    _forget_who_waits,
    _give_up_with_pins,
    _leave_without_lease,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_broken_is_found(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in range(40):
        if run(draw_case(seed, "tiers")).failure is not None:
            return
        try:
            Fuzz(seed).run(2000)
        except (Violation, BugError, KeyError):
            return
    raise AssertionError("nothing has been found")
