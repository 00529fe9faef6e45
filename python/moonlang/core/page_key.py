"""Names of pages: a chain of hashes over the tokens, so that two nodes agree on a page's name without talking.

The key of page i is SHA-256(key of page i - 1 | its token ids as little-endian uint32); the first page has no
predecessor, or the seed of a namespace when the request may share KV only with its like (cache salt, LoRA). This is
SGLang's page hash, so a router or another engine can compute it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

KEY_BYTES = 32


def namespace(extra_key: str) -> bytes:
    """The seed of a chain: empty for requests that share with everybody."""
    return sha256(b"moonlang-cache-namespace-v1\0" + extra_key.encode()).digest() if extra_key else b""


def next_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens` and follows the page named `previous`."""
    return sha256(previous + struct.pack(f"<{len(tokens)}I", *tokens)).digest()


def prompt_key(tokens: Sequence[int], extra_key: str) -> bytes:
    """One key for a whole prompt of any length: two requests under one name but with other tokens differ in it."""
    return next_key(namespace(extra_key), tokens)


class PageKeys:
    """The keys of one growing sequence, each computed once."""

    __slots__ = ("_keys", "_page_size", "_seed")

    def __init__(self, page_size: int, extra_key: str = "") -> None:
        self._page_size = page_size
        self._seed = namespace(extra_key)
        self._keys: list[bytes] = []

    def upto(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """Keys of the first `count` pages of `tokens`, which may only have grown since the last call."""
        keys, size = self._keys, self._page_size
        while len(keys) < count:
            at = len(keys) * size
            keys.append(next_key(keys[-1] if keys else self._seed, tokens[at : at + size]))
        return keys[:count]
