"""Requests read only KV that was computed under their own extra key (LoRA, cache salt)."""

from __future__ import annotations

from moonlang.core.plan import StepPlan
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "isolation"


class Isolation(Watch[Stage]):
    """Remembers for every page under which key it was written last: the tokens of the oracle know no key."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}  # slot -> page table of its newest tenant
        self._keys: dict[int, str] = {}  # page -> key of its last writer

    def on_plan(self, stage: Stage, plan: StepPlan) -> None:
        size = stage.config.page_size
        for start in plan.starts:
            self._tables[start.slot] = []
        by_epoch = {request.epoch: request for request in inside.running(stage.scheduler)}
        for row in plan.rows:
            request = by_epoch[row.epoch]
            table = self._tables[row.slot]
            table[row.page_at : row.page_at + len(row.pages)] = row.pages
            first, last = row.start // size, (row.start + row.length - 1) // size
            # Cells before the row are in pages up to `first` if it is begun, else up to the one before.
            for page in table[: -(-row.start // size)]:
                if self._keys.get(page) != request.extra_key:
                    raise Violation(
                        _NAME, f"{request.rid} of key {request.extra_key!r} reads page {page}, which is not"
                    )
            self._keys.update(dict.fromkeys(table[first : last + 1], request.extra_key))

    def arrived(self, page: int, key: str) -> None:
        """Another server, or a lower tier, has written to this page for a request of this key."""
        self._keys[page] = key

    def key_of(self, page: int) -> str:
        """Of its last writer."""
        return self._keys[page]
