"""A KV pool that other servers read from and write into, piece by piece.

Attention in the simulator knows no layers and no heads: every part of a page holds the same cells. But layers are
computed one after the other, heads live on different ranks, and both travel by themselves. So the pool knows for each
*part* (layer, k or v, head) of a page what it holds, and tells whoever computes on a page whose parts do not agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.core.kv import KvRegion, unsharded
from moonlang.sim.executor import PagedCells
from moonlang.sim.violation import Violation

Content = tuple[int, ...]  # the running sums of one page, as one part holds them

_CHECKSUM_BITS = (1 << 64) - 1
_SPOILED = -1  # attention over pages that hold no sense


class SharedCells(PagedCells):
    """PagedCells whose content has a time in each layer and a place in each rank.

    While a plan runs (`stage` .. `finish`), `advance` tells how many layers of it are written; others see the rest of
    the pages as they were before.
    """

    def __init__(self, regions: Sequence[KvRegion]) -> None:
        self._schema = unsharded(regions)
        super().__init__(regions[0].num_pages, self._schema.page_size)
        self._regions = regions
        self._num_parts = 2 * self._schema.num_layers * self._schema.num_kv_heads
        self._staged: dict[int, Content] | None = None  # what the pages that a running plan writes held before
        self._layers_done = 0
        self._is_shared = False  # others have written to some page
        self._landed: dict[int, dict[int, tuple[int, Content]]] = {}  # page -> part -> (part it was, content)
        self._parts: dict[tuple[int, int, int], range | list[int]] = {}

    # ---- for the executor

    def read(self, table: list[int], length: int) -> int:
        """A row of a request that has ended meanwhile may read pages that others write to by now: nobody will look at
        what comes of it. Should somebody, it is wrong."""
        if not self._is_shared:
            return super().read(table, length)
        try:
            for page in table[: -(-length // self.page_size)]:
                self._settle(page)
            return super().read(table, length)
        except Violation:
            return _SPOILED

    def write(self, page: int, offset: int, value: int) -> None:
        if offset:
            self._settle(page)
        else:
            self._landed.pop(page, None)
        if self._staged is not None and page not in self._staged:
            self._staged[page] = tuple(self._sums[page])
        super().write(page, offset, value)

    def stage(self) -> None:
        """A plan begins."""
        self._staged, self._layers_done = {}, 0

    def advance(self, layers_done: int) -> None:
        """The plan has written so many layers."""
        self._layers_done = layers_done

    def finish(self) -> None:
        """The plan is done: all its layers are written."""
        self._staged = None

    # ---- for transfers

    def parts(self, rank: int, offset: int, size: int) -> Sequence[int]:
        """The parts that bytes [offset, offset + size) of a page of this rank are."""
        key = (rank, offset, size)
        if key not in self._parts:
            self._parts[key] = self._find_parts(*key)
        return self._parts[key]

    def snapshot(self, page: int, part: int) -> Content:
        """What somebody who copies this part of the page now gets."""
        if self._staged is not None and page in self._staged and self._layer(part) >= self._layers_done:
            return self._staged[page]
        landed = self._landed.get(page)
        return landed[part][1] if landed is not None and part in landed else tuple(self._sums[page])

    def land(self, page: int, part: int, origin: int, content: Content) -> None:
        """Somebody writes what was part `origin` of a page of his to part `part` of this one."""
        self._is_shared = True
        self._landed.setdefault(page, {})[part] = (origin, content)

    def _layer(self, part: int) -> int:
        return part // (2 * self._schema.num_kv_heads)

    def _find_parts(self, rank: int, offset: int, size: int) -> list[int]:
        region, heads = self._regions[rank], self._schema.num_kv_heads
        head_bytes = region.schema.page_size * region.schema.head_dim * region.schema.itemsize
        first, odd = divmod(offset, head_bytes)
        count, rest = divmod(size, head_bytes)
        local = region.schema.num_kv_heads
        if odd or rest or count < 1 or offset + size > region.schema.page_bytes:
            raise Violation("executor", f"bytes {offset} + {size} of a page are not whole heads of {head_bytes} bytes")
        return [i // local * heads + region.first_head + i % local for i in range(first, first + count)]

    def _settle(self, page: int) -> None:
        """Others have written to this page and it is used now: all its parts must hold the same."""
        landed = self._landed.pop(page, None)
        if landed is None:
            return
        moved = {part: origin for part, (origin, _) in landed.items() if part != origin}
        if moved:
            raise Violation("executor", f"page {page} holds other layers or heads than it should: {moved}")
        contents = list(dict.fromkeys(content for _, content in landed.values()))
        if len(landed) < self._num_parts:
            contents.append(tuple(self._sums[page]))
        if any(content != contents[0] for content in contents):
            raise Violation("executor", f"page {page} is used while its parts hold different cells: {contents}")
        self._sums[page] = list(contents[0])


def checksum(contents: Sequence[Content]) -> int:
    """Of what a push has read, or a look at what has landed: 64 bits."""
    return hash(tuple(contents)) & _CHECKSUM_BITS
