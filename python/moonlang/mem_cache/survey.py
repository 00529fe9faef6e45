"""A look at the biggest prefixes of the tree, for operators: the heaviest nodes first, a few at a time.

A tree may have 10^5 nodes and the scheduler has steps to plan, so a survey is taken in pieces (`advance`), and costs
what it reports rather than what the tree holds: nodes know their weight. Between two pieces the tree may change; nodes
that have gone are left out, and the rest is as true as a view of something that moves can be.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.radix import Node, RadixCache

MOST_NODES = 10_000
MAX_DEPTH = 48  # below it nodes count as the rest of the one above
TEXT_TOKENS = 24  # of a node's run that are reported, so that somebody can recognise it
MOST_TEXTS = 300  # nodes that are reported with these

_COLUMNS = ("parent", "id", "pages", "weight", "children", "hits", "idle", "locked")
_NO_PARENT = -1


class Survey:
    """The `most` heaviest nodes of `cache`. Call `advance` until it returns True, then `report`."""

    def __init__(self, cache: RadixCache | NoCache, most: int) -> None:
        self._cache = cache
        self._most = min(most, MOST_NODES)
        self._heap: list[tuple[int, int, int, int, Node]] = []  # -weight, id, depth, index of the parent, node
        self._siblings: Iterator[Node] = iter(cache.roots)
        self._parent, self._depth = _NO_PARENT, 0  # of the siblings that are being looked at
        self._columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        self._count = 0
        self._texts: list[list[int]] = []

    def advance(self, looks: int) -> bool:
        """Look at up to so many nodes; True when the survey is complete."""
        for _ in range(looks):
            node = next(self._siblings, None)
            if node is not None:
                heapq.heappush(self._heap, (-node.weight, node.id, self._depth, self._parent, node))
            elif not self._heap or self._count >= self._most:
                return True
            else:
                self._take()
        return False

    def _take(self) -> None:
        """Report the heaviest node known, and look at its children next."""
        _, _, depth, parent, node = heapq.heappop(self._heap)
        if not node.weight or (depth and node.parent is None):
            return  # it has been evicted meanwhile
        self._parent, self._depth = self._count, depth + 1
        self._count += 1
        if depth < MAX_DEPTH:
            self._siblings = iter(list(node.children.values()))
        idle = self._cache.clock - node.used
        row = (parent, node.id, len(node.pages), node.weight, len(node.children), node.hits, idle, int(node.locks > 0))
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        if len(self._texts) < MOST_TEXTS:
            self._texts.append(node.tokens[:TEXT_TOKENS])

    def report(self) -> dict[str, Any]:
        """The nodes column by column, parents before children; sizes in pages.

        parent: index of the parent, -1 for roots, of which there is one per extra key. pages: of the node itself,
        weight: with all below it. idle: operations of the tree since its last use. tokens: how the first rows begin.
        """
        return {**self._columns, "tokens": self._texts, "num_nodes": self._cache.num_nodes}
