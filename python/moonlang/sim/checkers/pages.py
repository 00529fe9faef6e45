"""Every page has one owner; nothing that a plan in flight writes to is free; at the end all pages are back."""

from __future__ import annotations

from moonlang.base.errors import BugError
from moonlang.core.plan import Row, StepPlan
from moonlang.mem_cache.pool import Owner
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch, is_due
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "pages"


class Pages(Watch[Stage]):
    """Keeps the page tables that the plans describe, and compares them with the ledger."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}  # slot -> page table of its newest tenant
        self._written: dict[int, list[int]] = {}  # plan id -> pages that the plan writes to

    def on_plan(self, stage: Stage, plan: StepPlan) -> None:
        owners = inside.owners(stage.scheduler)
        size = stage.config.page_size
        for start in plan.starts:
            self._tables[start.slot] = []
        written: list[int] = []
        for row in plan.rows:
            table = self._tables[row.slot]
            table[row.page_at : row.page_at + len(row.pages)] = row.pages
            first, last = row.start // size, (row.start + row.length - 1) // size
            for index, page in enumerate(table[: last + 1]):
                owner = owners[page]
                if owner != Owner.LEASED and (index >= first or owner != Owner.CACHED):
                    raise Violation(_NAME, f"{_what(row, index >= first)} page {page}, which is {Owner(owner).name}")
            written += table[first : last + 1]
        self._written[plan.plan_id] = written

    def after_step(self, stage: Stage) -> None:
        owners = inside.owners(stage.scheduler)
        self._written = {plan.plan_id: self._written[plan.plan_id] for plan in stage.pipeline.plans}
        for plan_id, pages in self._written.items():
            # A page that is only read may be freed: its next tenant writes in a later plan.
            free = [page for page in pages if owners[page] == Owner.FREE]
            if free:
                raise Violation(_NAME, f"pages {free} are free while plan {plan_id} writes to them")
        if is_due(stage):
            self._count(stage)

    def at_end(self, stage: Stage) -> None:
        self._count(stage)
        scheduler = stage.scheduler
        pool = inside.pool(scheduler)
        if not scheduler.idle or not scheduler.flush_cache():
            raise Violation(_NAME, "the scheduler is not idle at the end")
        if pool.free != pool.capacity:
            raise Violation(_NAME, f"{pool.capacity - pool.free} of {pool.capacity} pages are lost at the end")

    def _count(self, stage: Stage) -> None:
        """Sum up the owners from what the holders hold, not from the ledger's counters."""
        scheduler = stage.scheduler
        pool, owners = inside.pool(scheduler), inside.owners(scheduler)
        cached = [page for node in inside.cache(scheduler).nodes() for page in node.pages]
        leased = [page for lease in inside.leases(scheduler) for page in lease.pages[lease.shared :] + lease.spare]
        for owner, pages in ((Owner.CACHED, cached), (Owner.LEASED, leased)):
            held = dict.fromkeys(pages)
            wrong = [page for page in held if owners[page] != owner]
            if wrong or len(held) != len(pages) or len(pages) != pool.count(owner):
                raise Violation(
                    _NAME, f"{len(pages)} pages are held as {owner.name}, {pool.count(owner)} counted; {wrong}"
                )
        if sum(pool.count(owner) for owner in Owner) != pool.capacity:
            raise Violation(_NAME, "the owners do not add up to the pool")
        stats = scheduler.stats()
        if stats.used_tokens + stats.cached_tokens + stats.free_tokens != stats.max_total_tokens:
            raise Violation(_NAME, f"the reported tokens do not add up: {stats}")
        try:
            scheduler.check()
        except BugError as error:
            raise Violation(_NAME, str(error)) from error


def _what(row: Row, writes: bool) -> str:
    return f"row {row.slot}@{row.start}+{row.length} {'writes to' if writes else 'reads'}"
