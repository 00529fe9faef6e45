"""Pages as runs of bytes: what a push copies from where to where, and the checksum over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moonlang.base import checksum as sums
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import Push, Span

Words = NDArray[np.uint64]


class Runs(NamedTuple):
    """sizes[i] bytes from address source[i] here to address target[i] there, i < n; no two can be joined."""

    source: Words
    target: Words
    sizes: Words


def runs(push: Push, here: KvRegion, there: KvRegion) -> Runs:
    """The copies of a push, pages in order and within a page its spans, neighbours on both sides joined."""
    spans = np.array([(span.source, span.target, span.size) for span in push.spans], np.uint64).reshape(-1, 3)
    source = (_starts(here, push.source)[:, None] + spans[:, 0]).ravel()
    target = (_starts(there, push.target)[:, None] + spans[:, 1]).ravel()
    sizes = np.tile(spans[:, 2], len(push.source))
    ends = source + sizes
    joins = (source[1:] == ends[:-1]) & (target[1:] == target[:-1] + sizes[:-1])
    first = np.flatnonzero(np.concatenate(([True], ~joins))[: len(sizes)])
    return Runs(source[first], target[first], np.add.reduceat(sizes, first))


def cut(found: Runs, most: int) -> Runs:
    """The same bytes in runs of at most `most` bytes."""
    pieces = -(-found.sizes.astype(np.int64) // most)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = (nth * most).astype(np.uint64)
    sizes = np.minimum(np.repeat(found.sizes, pieces) - offsets, np.uint64(most))
    return Runs(np.repeat(found.source, pieces) + offsets, np.repeat(found.target, pieces) + offsets, sizes)


def checksum(region: KvRegion, pages: Sequence[int], spans: Sequence[Span]) -> int:
    """Of what has landed: the target side of `spans` of `pages`, pages in order and within a page its spans."""
    starts = (region.address + page * region.stride for page in pages)
    return sums.of_memory((start + span.target, span.size) for start in starts for span in spans)


def _starts(region: KvRegion, pages: Sequence[int]) -> Words:
    return np.uint64(region.address) + np.asarray(pages, np.uint64) * np.uint64(region.stride)
