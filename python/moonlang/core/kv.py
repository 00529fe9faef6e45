"""The shape of KV memory: one page format for every tier and every wire.

A page is one contiguous block `[layer][k|v][kv_head][token][dim]`. The pool is `[page]` of such blocks. Integers have a
scale of their own behind each `[dim]`: float32, and the number times the scale is the key or value. Where attention is
over a latent (MLA) a page is `[layer][token][latent]`: one number in place of key and value, for all heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

# By what --kv-cache-dtype says: torch name of the elements, bytes of one, bytes of the scale behind a row.
ELEMENTS = {
    "float32": ("float32", 4, 0),
    "bfloat16": ("bfloat16", 2, 0),
    "float16": ("float16", 2, 0),
    "fp8_e4m3": ("float8_e4m3fn", 1, 0),
    "fp8_e5m2": ("float8_e5m2", 1, 0),
    "int8": ("int8", 1, 4),
}


class KvSchema(msgspec.Struct, frozen=True, kw_only=True):
    """Layout of one page. `fingerprint` names the weights: pages of different fingerprints never mix."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    dtype: str  # torch name without the prefix: "bfloat16"
    itemsize: int  # bytes
    scale_bytes: int = 0  # behind each row of head_dim numbers
    latent: bool = False  # a token's row is key and value in one; num_kv_heads is 1, and every rank has all of it
    fingerprint: str = ""

    @property
    def row_bytes(self) -> int:
        """One token of one head: its keys or its values, or the latent."""
        return self.head_dim * self.itemsize + self.scale_bytes

    @property
    def halves(self) -> int:
        """Rows that a token has in a head: a key and a value, or the latent that is both."""
        return 1 if self.latent else 2

    @property
    def token_bytes(self) -> int:
        return self.halves * self.num_layers * self.num_kv_heads * self.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.token_bytes * self.page_size

    def digest(self) -> str:
        """Hex digest of everything two pools must agree on before a page of one may be read by the other."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class KvRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A pool in memory that other engines may read or write: page i starts at address + i * stride (bytes).

    first_head: with tensor parallelism the pool of one rank holds KV heads [first_head, first_head + num_kv_heads) of
    the model; its schema counts those. first_layer: the same for the layers of a stage of a pipeline.
    """

    address: int
    stride: int
    num_pages: int
    schema: KvSchema
    first_head: int = 0
    first_layer: int = 0


def unsharded(regions: Sequence[KvRegion]) -> KvSchema:
    """The schema of one instance's pages with the heads and layers of all its ranks put together: what two instances
    of different parallelism have in common."""
    heads = max(region.first_head + region.schema.num_kv_heads for region in regions)
    layers = max(region.first_layer + region.schema.num_layers for region in regions)
    return msgspec.structs.replace(regions[0].schema, num_kv_heads=heads, num_layers=layers)
