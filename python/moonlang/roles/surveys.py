"""Surveys of the prefix tree that the scheduler role takes between its steps."""

from __future__ import annotations

from collections import deque
from typing import Any

from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.survey import Survey

LOOKS = 1000  # nodes looked at per step: a millisecond
MOST = 8  # surveys at once


class Surveys:
    """One after the other, a bounded part of one per step."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Survey]] = deque()

    @property
    def busy(self) -> bool:
        """`advance` has more to do."""
        return bool(self._queue)

    def begin(self, control_id: int, cache: RadixCache | NoCache, nodes: int) -> bool:
        """Look for the heaviest `nodes` nodes; False when too many others want the same."""
        if len(self._queue) >= MOST:
            return False
        self._queue.append((control_id, Survey(cache, nodes)))
        return True

    def advance(self) -> list[tuple[int, dict[str, Any]]]:
        """What is complete now: the call that asked, and its answer."""
        if not self._queue:
            return []
        control_id, survey = self._queue[0]
        if not survey.advance(LOOKS):
            return []
        self._queue.popleft()
        return [(control_id, survey.report())]
