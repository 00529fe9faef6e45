"""What the prefix tree has gained and lost, in the form in which SGLang publishes it: routers keep an index of it.

A block is a page. Its hash is the first eight bytes of the page's chained key (`core.page_key`), as a signed integer.
"""

from __future__ import annotations

import msgspec

DEVICE = "GPU"  # what the protocol calls the memory that attention reads, on whatever device


class BlockStored(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """token_ids: of all blocks, one after the other. parent_block_hash: of the block before the first."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Everything that was said before is void."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """ts: seconds since 1970. attn_dp_rank: the data-parallel replica whose tree this is."""

    ts: float
    events: list[KvEvent]
    attn_dp_rank: int | None = None


def block_hash(key: bytes) -> int:
    """Of a page, by its chained key."""
    return int.from_bytes(key[:8], "big", signed=True)
