"""Attention in plain torch: the reference that every faster backend is compared with, on any device torch knows.

Decode rows are gathered from the pool into padded batches and attended together; prefill rows one by one. Everything
that does not depend on the layer (indices, masks, groups of rows) is made once per forward, in `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moonlang.attention.batch import AttentionSpec, BatchLayout, KvPages

_PADDED_ELEMENTS = 1 << 25  # keys and values of one decode group, padding included: bounds its memory
_SHORT_TOKENS = 256  # decode rows up to this length share a group whatever their lengths
_MASK_ELEMENTS = 1 << 21  # queries x keys of one masked prefill block
_TOKEN_MULTIPLE = 16  # a decode group is padded to this: matrix libraries round odd sizes differently from even ones


@dataclass(slots=True)
class _DecodeGroup:
    """Decode rows of similar length, padded to `tokens` keys each.

    rows: [R] row numbers, None for all decode rows in order. blocks: [2 * R * K * n] pool blocks of the keys, then
    values (of a latent [R * n]: it is both). mask: [R * K, 1, tokens] float32, 0 or -inf.
    """

    rows: Tensor | None
    blocks: Tensor
    mask: Tensor
    tokens: int


@dataclass(slots=True)
class _PrefillBlock:
    """Queries [first, last) of the batch, consecutive tokens of one row.

    blocks: [2 * K * n] pool blocks of the keys, then values, of which the first `tokens` positions count; None when the
    queries are their own keys (nothing cached before them). mask: [last - first, tokens] bool; None: plain causal.
    """

    first: int
    last: int
    tokens: int
    blocks: Tensor | None
    mask: Tensor | None


@dataclass(slots=True)
class _View:
    """The batch as layers of one window size see it."""

    decode: list[_DecodeGroup]
    prefill: list[_PrefillBlock]


@dataclass(slots=True)
class _Prepared:
    layout: BatchLayout
    longest: int  # tokens of the longest sequence
    views: dict[tuple[int | None, bool], _View]  # by window, and whether scores are in memory


class TorchNative:
    """Stateless: one object may serve any number of pools and models."""

    def prepare(self, layout: BatchLayout, pool: KvPages) -> _Prepared:
        """Clear the pages this forward begins, and start with no views: each is made when a layer first needs it."""
        if pool.buffer.shape[4] > 1:
            # A page keeps its last tenant's numbers behind the tokens written so far. The mask gives them weight 0,
            # but 0 * NaN is NaN, and one overflowing request must not poison the next.
            pool.buffer.index_fill_(0, layout.store_page[layout.store_offset == 0], 0)
        longest = max(s + n for s, n in zip(layout.row_starts, layout.row_lengths, strict=True))
        return _Prepared(layout=layout, longest=longest, views={})

    def attend(
        self,
        prepared: _Prepared,
        pool: KvPages,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        layout = prepared.layout
        pool.key(layer)[layout.store_page, :, layout.store_offset] = k
        if v is None:
            v = k[..., : spec.value_dim]
        else:
            pool.value(layer)[layout.store_page, :, layout.store_offset] = v
        by_scores = spec.softcap is not None or sinks is not None
        view = self._view(prepared, pool, spec, by_scores or spec.value_dim is not None)
        blocks = _pool_blocks(pool.buffer, layer)
        if not view.prefill and view.decode[0].rows is None:
            return _decode(view.decode[0], blocks, q, k.shape[1], spec, sinks)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for group in view.decode:
            rows = slice(0, layout.num_decode) if group.rows is None else group.rows
            out[rows] = _decode(group, blocks, q[rows], k.shape[1], spec, sinks)
        for block in view.prefill:
            attend = _prefill_by_scores if by_scores else _prefill_fused
            mine = slice(block.first, block.last)
            out[mine] = attend(q[mine], *_keys_values(block, blocks, k, v, spec), block.mask, spec, sinks)
        return out

    @staticmethod
    def _view(prepared: _Prepared, pool: KvPages, spec: AttentionSpec, scores_in_memory: bool) -> _View:
        window = spec.window if spec.window is not None and spec.window < prepared.longest else None
        key = window, scores_in_memory
        view = prepared.views.get(key)
        if view is None:
            make = _ViewMaker(prepared.layout, pool.buffer, window)
            view = prepared.views[key] = _View(make.decode_groups(), make.prefill_blocks(scores_in_memory))
        return view


class _ViewMaker:
    """Makes the groups and blocks of one window size."""

    def __init__(self, layout: BatchLayout, buffer: Tensor, window: int | None) -> None:
        _, layers, halves, heads, self.page, dim = buffer.shape
        self.layout = layout
        self.window = window
        self.token_elements = halves * heads * dim
        self.heads = heads
        self.page_blocks = layers * halves * heads
        # Offsets of the K key blocks, then of the K value blocks, of layer 0 within a page.
        self.head_blocks = torch.arange(halves * heads, device=buffer.device).view(halves, 1, heads, 1)

    def _first_page(self, start: int) -> int:
        """The page where the oldest token lies that position `start` sees."""
        return 0 if self.window is None else max(0, start + 1 - self.window) // self.page

    def _blocks(self, pages: Tensor) -> Tensor:
        """pages: [R, n] -> [2 * R * K * n] blocks: gathered, they are keys and values as [2, R * K, n * p, D]; of a
        latent [R * n] and [1, R, n * p, D]."""
        return (pages[:, None, :] * self.page_blocks + self.head_blocks).flatten()

    def decode_groups(self) -> list[_DecodeGroup]:
        count = self.layout.num_decode
        if count == 0:
            return []
        starts = self.layout.row_starts[:count]
        longest = self._pages(max(starts))
        padded = count * longest * self.page
        if padded * self.token_elements <= _PADDED_ELEMENTS and (
            longest * self.page <= _SHORT_TOKENS or padded <= 2 * (sum(starts) + count * self.page)
        ):
            return [self._group(None, longest)]
        return self._groups_by_length(starts)

    def _pages(self, start: int) -> int:
        """How many pages to gather for a decode row at position `start`, so that it sees all it should."""
        pages = start // self.page + 1
        if self.window is not None:
            pages = min(pages, (self.window - 1) // self.page + 2)
        tokens = -(-pages * self.page // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
        return -(-tokens // self.page)

    def _groups_by_length(self, starts: list[int]) -> list[_DecodeGroup]:
        """Longest first; a group takes rows down to half its longest, as many as the memory bound allows."""
        groups: list[_DecodeGroup] = []
        order = sorted(range(len(starts)), key=lambda row: (-starts[row], row))
        at = 0
        while at < len(order):
            longest = self._pages(starts[order[at]])
            room = max(1, _PADDED_ELEMENTS // (longest * self.page * self.token_elements))
            shortest = 0 if longest * self.page <= _SHORT_TOKENS else longest / 2
            members = [row for row in order[at : at + room] if self._pages(starts[row]) >= shortest]
            groups.append(self._group(torch.tensor(sorted(members), device=self.layout.starts.device), longest))
            at += len(members)
        return groups

    def _group(self, rows: Tensor | None, longest: int) -> _DecodeGroup:
        """rows: see `_DecodeGroup`; longest: pages to gather per row."""
        count = self.layout.num_decode
        starts = (self.layout.starts[:count] if rows is None else self.layout.starts[rows])[:, None]
        table = self.layout.page_table[:count] if rows is None else self.layout.page_table[rows]
        columns = torch.arange(longest, device=table.device).expand(len(starts), longest)
        if self.window is not None:
            columns = columns + (starts + 1 - self.window).clamp(min=0) // self.page
        positions = (columns[:, :, None] * self.page + torch.arange(self.page, device=table.device)).flatten(1)
        hidden = positions > starts
        if self.window is not None:
            hidden |= positions <= starts - self.window
        mask = torch.zeros(hidden.shape, device=table.device).masked_fill_(hidden, float("-inf"))
        # Padding reads the row's own last page again: never memory of another request.
        pages = table.gather(1, torch.minimum(columns, starts // self.page))
        return _DecodeGroup(
            rows=rows,
            blocks=self._blocks(pages),
            mask=mask.repeat_interleave(self.heads, 0)[:, None],
            tokens=longest * self.page,
        )

    def prefill_blocks(self, scores_in_memory: bool) -> list[_PrefillBlock]:
        """scores_in_memory: the layer cannot use a fused kernel, so even a plain causal row is cut into blocks."""
        blocks: list[_PrefillBlock] = []
        count, first = self.layout.num_decode, self.layout.num_decode
        for row in range(count, len(self.layout.row_starts)):
            start, length = self.layout.row_starts[row], self.layout.row_lengths[row]
            if start == 0 and not scores_in_memory and (self.window is None or self.window >= length):
                blocks.append(_PrefillBlock(first, first + length, length, None, None))
            else:
                step = max(1, _MASK_ELEMENTS // min(start + length, (self.window or start + length) + length))
                cuts = range(0, length, step)
                blocks.extend(self._block(row, first + at, start + at, min(step, length - at)) for at in cuts)
            first += length
        return blocks

    def _block(self, row: int, first: int, start: int, length: int) -> _PrefillBlock:
        """Positions [start, start + length) of `row`, which are tokens [first, first + length) of the batch."""
        begin, end = self._first_page(start), start + length
        table = self.layout.page_table
        pages = table[row : row + 1, begin : (end - 1) // self.page + 1]
        keys = torch.arange(begin * self.page, end, device=table.device)
        queries = torch.arange(start, end, device=table.device)[:, None]
        mask = keys <= queries
        if self.window is not None:
            mask &= keys > queries - self.window
        return _PrefillBlock(first, first + length, len(keys), self._blocks(pages), mask)


def _pool_blocks(buffer: Tensor, layer: int) -> Tensor:
    """The pool as [blocks, p * D], one block per (page, layer, k|v, head), beginning with the first of `layer`."""
    _, _, halves, heads, page, dim = buffer.shape
    return buffer.view(-1, page * dim)[layer * halves * heads :]


def _gathered(blocks: Tensor, wanted: Tensor, rows: int, dim: int, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys [rows, tokens, D] and values [rows, tokens, spec.value_dim or D] of the `wanted` blocks."""
    halves = 2 if spec.value_dim is None else 1
    found = blocks.index_select(0, wanted).view(halves, rows, -1, dim)
    return found[0], found[-1][..., : spec.value_dim]


def _decode(
    group: _DecodeGroup, blocks: Tensor, q: Tensor, kv_heads: int, spec: AttentionSpec, sinks: Tensor | None
) -> Tensor:
    """q: [R, H, D] -> [R, H, D]. The heads that share a kv head are the rows of one small matrix product."""
    count, heads, dim = q.shape
    keys, values = _gathered(blocks, group.blocks, count * kv_heads, dim, spec)
    q = q.reshape(count * kv_heads, heads // kv_heads, dim)
    sink = None if sinks is None else sinks.view(kv_heads, -1, 1).repeat(count, 1, 1)
    return _attend_by_scores(q, keys, values, group.mask, spec, sink).view(count, heads, -1)


def _attend_by_scores(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, spec: AttentionSpec, sink: Tensor | None
) -> Tensor:
    """q: [N, M, D], keys: [N, S, D], values: [N, S, Dv], mask: [N, 1 or M, S] float32, added -> [N, M, Dv].

    sink: [N, M, 1] or None. In float32 whatever the model's dtype: as exact as fused kernels, and for 16-bit products
    of ever new shapes oneDNN would compile kernel after kernel.
    """
    mask = mask.expand(len(q), q.shape[1], keys.shape[1])
    products, keys = q.float(), keys.float().transpose(1, 2)
    if spec.softcap is None:
        scores = torch.baddbmm(mask, products, keys, alpha=spec.scale)
    else:
        scores = torch.bmm(products, keys).mul_(spec.scale / spec.softcap).tanh_().mul_(spec.softcap).add_(mask)
    if sink is not None:
        scores = torch.cat((scores, sink.float()), -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]]
    return torch.bmm(weights, values.float()).to(values.dtype)


def _keys_values(
    block: _PrefillBlock, blocks: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """What the block's queries see: [K, S, D] each."""
    if block.blocks is None:
        return k[block.first : block.last].transpose(0, 1), v[block.first : block.last].transpose(0, 1)
    keys, values = _gathered(blocks, block.blocks, k.shape[1], k.shape[2], spec)
    return keys[:, : block.tokens], values[:, : block.tokens]


def _prefill_fused(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec, sinks: Tensor | None
) -> Tensor:
    """q: [n, H, D], keys, values: [K, S, D], mask: [n, S] bool, None: plain causal -> [n, H, D]. sinks: none."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=spec.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _prefill_by_scores(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec, sinks: Tensor | None
) -> Tensor:
    """The same for what a fused kernel does not know. There is a mask (see `prefill_blocks`)."""
    assert mask is not None
    length, heads, dim = q.shape
    kv_heads, group = len(keys), heads // len(keys)
    hidden = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    q = q.transpose(0, 1).reshape(kv_heads, group * length, dim)
    sink = None if sinks is None else sinks.view(kv_heads, group, 1).repeat_interleave(length, 1)
    out = _attend_by_scores(q, keys, values, hidden.repeat(group, 1)[None], spec, sink)
    return out.view(heads, length, -1).transpose(0, 1)


BACKEND = TorchNative
