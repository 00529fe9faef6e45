"""Which prefixes a worker has probably cached, as far as the router can know: those it was sent, the oldest forgotten.

A radix tree whose edges are all BLOCK_CHARS long needs no nodes: a prefix is the chained hash of its blocks, and a tree
is the set of them. `add` renews a path from its end to its root, so the least recently used block is always a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_CHARS = 128  # some 30 tokens: less would seldom be worth a different worker
MAX_BLOCKS = 4096  # of one prompt; what follows half a million characters does not decide where it goes


def path(prompt: bytes) -> list[bytes]:
    """The prefixes of a prompt, shortest first; the rest that fills no block is left out."""
    chain = blake2b(digest_size=8)
    found: list[bytes] = []
    for end in range(BLOCK_CHARS, min(len(prompt), MAX_BLOCKS * BLOCK_CHARS) + 1, BLOCK_CHARS):
        chain.update(prompt[end - BLOCK_CHARS : end])
        found.append(chain.digest())
    return found


class PrefixIndex:
    """The prefixes of one worker, at most `max_chars` of them in all."""

    def __init__(self, max_chars: int) -> None:
        self._max_blocks = max_chars // BLOCK_CHARS
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        """The size in blocks."""
        return len(self._blocks)

    def match(self, path: Sequence[bytes]) -> int:
        """How many blocks at the beginning of a path are known. No block is known without those before it."""
        low, high = 0, len(path)
        while low < high:
            middle = (low + high + 1) // 2
            if path[middle - 1] in self._blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def add(self, path: Sequence[bytes]) -> None:
        """The worker has seen this."""
        for block in reversed(path):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """The worker has started anew."""
        self._blocks.clear()
