"""The pages of one instance as arrays of bytes, whatever the number of its ranks.

Ranks cut a page by heads, stages of a pipeline by layers. Outside the device pool its shards lie one after the other,
so that they move without being put together first; who has cut the heads otherwise rearranges the page when it has
arrived. The layers of a shard lie one after the other, whatever the number of stages: those do not show outside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moonlang.base.errors import BugError
from moonlang.channels.moves import Sums, move, page_parts
from moonlang.core.kv import KvRegion, unsharded

Bytes = NDArray[np.uint8]


class PagePool:
    """The pools of all ranks of an instance. They must outlive this.

    cuts: different slices of the heads. pieces: one array [P, piece bytes] for each slice and each stage, in the order
    of heads, then of layers: memory of the first rank that holds it, not a copy. Pages count as written when the first
    rank has them; `spread` serves the others. schema: of a whole page; page_bytes: of all pieces together.
    """

    def __init__(self, regions: Sequence[KvRegion]) -> None:
        holders: dict[tuple[int, int], list[Bytes]] = {}
        for region in sorted(regions, key=_place):
            holders.setdefault(_place(region), []).append(_of_region(region))
        self.schema = unsharded(regions)
        self.page_bytes = self.schema.page_bytes
        self.cuts = len({head for head, _ in holders})
        self.pieces: tuple[Bytes, ...] = tuple(same[0] for same in holders.values())
        self._copies = tuple(tuple(same[1:]) for same in holders.values())
        self._places = tuple((piece.ctypes.data, piece.shape[1]) for piece in self.pieces)
        by_head = [sum(each.shape[1] for (at, _), (each, *_) in holders.items() if at == head) for head, _ in holders]
        if sum(size for _, size in self._places) != self.page_bytes or len(set(by_head)) > 1:
            raise BugError("The ranks' slices of a page are unequal, or do not make up the page.")

    def sums(self, pages: Sequence[int]) -> Sums:
        """Checksums of these pages."""
        return move(page_parts(self._places, pages, None, out=True))

    def copy_out(self, pages: Sequence[int], addresses: Sequence[int]) -> Sums:
        """Copy the pieces of each page, one after the other, to an address; the checksums of what was written."""
        return move(page_parts(self._places, pages, addresses, out=True))

    def copy_in(self, pages: Sequence[int], addresses: Sequence[int]) -> Sums:
        """The other way round."""
        return move(page_parts(self._places, pages, addresses, out=False))

    def spread(self, pages: Sequence[int]) -> None:
        """Give what has been written into `pages` to the ranks that hold the same heads."""
        for piece, copies in zip(self.pieces, self._copies, strict=True):
            for copy in copies:
                for page in pages:
                    copy[page] = piece[page]

    def can_take(self, shards: int) -> bool:
        """Whether a page whose heads are cut into so many shards can be cut as this instance has it."""
        return shards > 0 and self.schema.num_kv_heads % shards == 0

    def recut(self, page: int, shards: int) -> None:
        """The bytes of `page` have come from an instance that cuts its heads into `shards`: put them in order."""
        if shards == self.cuts:
            return
        head_bytes = self.schema.page_size * self.schema.row_bytes
        rows = self.page_bytes // (self.schema.num_kv_heads * head_bytes)  # the keys of a layer, or its values
        came = np.empty(self.page_bytes, np.uint8)
        self.copy_out([page], [came.ctypes.data])
        whole = np.ascontiguousarray(came.reshape(shards, rows, -1).swapaxes(0, 1)).reshape(rows, self.cuts, -1)
        ours = np.ascontiguousarray(whole.swapaxes(0, 1))
        self.copy_in([page], [ours.ctypes.data])


def _place(region: KvRegion) -> tuple[int, int]:
    """Where its pages lie in a whole one, from outside."""
    return region.first_head, region.first_layer


def _of_region(region: KvRegion) -> Bytes:
    """[P, shard bytes]: the pool's own memory."""
    if region.stride != region.schema.page_bytes:
        raise BugError(f"Pages lie {region.stride} bytes apart and have {region.schema.page_bytes}.")
    size = region.num_pages * region.stride
    memory = (ctypes.c_uint8 * size).from_address(region.address)
    return np.ctypeslib.as_array(memory).reshape(region.num_pages, region.stride)
