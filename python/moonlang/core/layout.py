"""Which bytes of a page go where when two instances split KV heads or layers differently. Pure arithmetic, no bytes
moved.

A page is `[layer][k|v][kv_head][token][dim]`. With equal heads a run of layers is one span; otherwise the heads that
source and target rank have in common are a span for each layer and each of k and v. Latents are a head that is both
(`KvSchema.halves`), of which every rank has a copy. Stages of a pipeline have some of the layers each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from moonlang.core.kv import KvRegion, KvSchema, unsharded
from moonlang.core.pairing import Pushed, Span


class Route(msgspec.Struct, frozen=True):
    """Heads and layers that rank `source` of one instance has and rank `target` of the other one needs.

    source_head, target_head: where the heads begin, counted within the rank; heads: how many. layers: of the model,
    [first, end); source_layer, target_layer: the model's layers with which the ranks begin.
    """

    source: int
    target: int
    source_head: int
    target_head: int
    heads: int
    source_schema: KvSchema
    target_schema: KvSchema
    layers: tuple[int, int]
    source_layer: int = 0
    target_layer: int = 0

    def spans(self, first: int, end: int) -> tuple[Span, ...]:
        """What to copy of each page for layers [first, end) of the model; nothing when this route has none of them."""
        first, end = self._own(first, end)
        head_bytes, halves = _head_bytes(self.source_schema), self.source_schema.halves
        source_heads, target_heads = self.source_schema.num_kv_heads, self.target_schema.num_kv_heads
        if self.heads == source_heads == target_heads:
            layer_bytes = halves * self.heads * head_bytes
            source, target = (first - self.source_layer) * layer_bytes, (first - self.target_layer) * layer_bytes
            return (Span(source, target, (end - first) * layer_bytes),) if first < end else ()
        return tuple(
            Span(
                ((half - halves * self.source_layer) * source_heads + self.source_head) * head_bytes,
                ((half - halves * self.target_layer) * target_heads + self.target_head) * head_bytes,
                self.heads * head_bytes,
            )
            for half in range(halves * first, halves * end)  # k and v of each layer
        )

    def page_bytes(self, first: int, end: int) -> int:
        """Bytes that layers [first, end) of the model have on this route, of one page."""
        first, end = self._own(first, end)
        return self.source_schema.halves * (end - first) * self.heads * _head_bytes(self.source_schema)

    def _own(self, first: int, end: int) -> tuple[int, int]:
        """Those of layers [first, end) that go this way."""
        begin = max(first, self.layers[0])
        return begin, max(begin, min(end, self.layers[1]))


def mismatch(source: Sequence[KvRegion], target: Sequence[KvRegion]) -> str:
    """Why pages of `source` cannot be used by `target`; empty when they can."""
    mine, theirs = unsharded(source), unsharded(target)
    for name in KvSchema.__struct_fields__:
        ours, other = getattr(mine, name), getattr(theirs, name)
        if ours != other:
            return f"The instances differ in {name}: {ours} and {other}. Start both with the same model and page size."
    return ""


def routes(source: Sequence[KvRegion], target: Sequence[KvRegion]) -> tuple[Route, ...]:
    """Routes that bring every head of every layer to every target rank that holds it, once. The regions fit (see
    `mismatch`).

    Ranks may hold copies of the same heads: then targets are spread over the copies.
    """
    found: list[Route] = []
    for rank, region in enumerate(target):
        layer, last = region.first_layer, region.first_layer + region.schema.num_layers
        while layer < last:
            found += _of_layers(source, target, rank, layer)
            layer = found[-1].layers[1]
    return tuple(found)


def _of_layers(source: Sequence[KvRegion], target: Sequence[KvRegion], rank: int, layer: int) -> list[Route]:
    """Routes to one rank, for its layers from `layer` on that lie in one stage of the source."""
    region = target[rank]
    head, end = region.first_head, region.first_head + region.schema.num_kv_heads
    found: list[Route] = []
    while head < end:
        holders, takers = _ranks_with(source, head, layer), _ranks_with(target, head, layer)
        holder = holders[takers.index(rank) * len(holders) // len(takers)]
        origin = source[holder]
        until = min(end, origin.first_head + origin.schema.num_kv_heads)
        last = min(each.first_layer + each.schema.num_layers for each in (region, origin))
        found.append(
            Route(
                source=holder,
                target=rank,
                source_head=head - origin.first_head,
                target_head=head - region.first_head,
                heads=until - head,
                source_schema=origin.schema,
                target_schema=region.schema,
                layers=(layer, last),
                source_layer=origin.first_layer,
                target_layer=region.first_layer,
            )
        )
        head = until
    return found


def fits(pushed: Pushed, pages: int, regions: Sequence[KvRegion]) -> bool:
    """Whether a push stays within `pages` wanted pages and within the page of its rank."""
    if not (0 <= pushed.rank < len(regions) and pushed.at >= 0 and pushed.count > 0 and pushed.spans):
        return False
    page_bytes = regions[pushed.rank].schema.page_bytes
    inside = all(span.size > 0 and 0 <= span.target <= page_bytes - span.size for span in pushed.spans)
    return inside and pushed.at + pushed.count <= pages


def covered(pushes: Iterable[Pushed], pages: int, regions: Sequence[KvRegion]) -> bool:
    """Whether the pushes write every byte of every one of `pages` pages in every rank exactly once."""
    by_rank: list[list[Pushed]] = [[] for _ in regions]
    for pushed in pushes:
        by_rank[pushed.rank].append(pushed)
    return pages == 0 or all(
        _tiled(mine, pages, region.schema.page_bytes) for mine, region in zip(by_rank, regions, strict=True)
    )


def _tiled(pushes: Sequence[Pushed], pages: int, page_bytes: int) -> bool:
    """Between two neighbouring page boundaries of pushes all pages are written alike: look at each such run once."""
    cuts = sorted(dict.fromkeys([0, pages, *(p.at for p in pushes), *(p.at + p.count for p in pushes)]))
    for begin, end in pairwise(cuts):
        at = 0
        spans = [span for p in pushes if p.at <= begin and end <= p.at + p.count for span in p.spans]
        for span in sorted(spans, key=lambda s: s.target):
            if span.target != at:
                return False
            at += span.size
        if at != page_bytes:
            return False
    return cuts[-1] == pages


def _ranks_with(regions: Sequence[KvRegion], head: int, layer: int) -> list[int]:
    """The ranks that hold a head of a layer of the model."""
    return [
        i
        for i, r in enumerate(regions)
        if 0 <= head - r.first_head < r.schema.num_kv_heads and 0 <= layer - r.first_layer < r.schema.num_layers
    ]


def _head_bytes(schema: KvSchema) -> int:
    return schema.page_size * schema.row_bytes
