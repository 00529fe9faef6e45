"""From the rows of a plan to the arrays of one forward, without a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.attention.batch import BatchLayout
from moonlang.core.plan import Row
from moonlang.model_executor.slots import SlotTable

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward: row i computes positions [starts[i], starts[i] + lengths[i]) of the sequence in slot slots[i].

    ids: [T] in row order. page_table: [S + 1, Pmax] int32, of all slots; its last row names page 0 only.
    """

    ids: Ints
    slots: Ints  # [B]
    starts: Ints  # [B]
    lengths: Ints  # [B]
    page_table: NDArray[np.int32]
    page_size: int

    def ends(self) -> Ints:
        """[B]: where each row ends among the tokens."""
        return np.cumsum(self.lengths)


def gather(rows: Sequence[Row], slots: Ints, table: SlotTable, page_size: int) -> Batch:
    """The batch of `rows`, whose slot numbers are `slots` [B]. Their pages are in the table already."""
    starts = np.array([row.start for row in rows], np.int64)
    lengths = np.array([row.length for row in rows], np.int64)
    return Batch(_input_ids(rows, slots, table, lengths), slots, starts, lengths, table.page_table, page_size)


def _input_ids(rows: Sequence[Row], slots: Ints, table: SlotTable, lengths: Ints) -> Ints:
    """The ids a row brings, or the slot's last sampled token where it brings none."""
    given = [row.tokens for row in rows]
    if not any(given):
        return table.last_token[slots]
    ids = np.repeat(table.last_token[slots], lengths)
    brought = np.repeat([bool(tokens) for tokens in given], lengths)
    ids[brought] = np.fromiter(chain.from_iterable(given), np.int64, int(brought.sum()))
    return ids


def padded(batch: Batch, tokens: int) -> Batch:
    """`batch` with rows appended until it has `tokens` tokens. Their results mean nothing; their KV goes to page 0."""
    missing = tokens - len(batch.ids)
    if missing == 0:
        return batch
    longest = 1 if len(batch.ids) == len(batch.slots) else batch.page_table.shape[1] * batch.page_size
    lengths = np.minimum(longest, missing - np.arange(0, missing, longest))
    rows = len(lengths)
    return Batch(
        np.append(batch.ids, np.zeros(missing, np.int64)),
        np.append(batch.slots, np.full(rows, len(batch.page_table) - 1)),
        np.append(batch.starts, np.zeros(rows, np.int64)),
        np.append(batch.lengths, lengths),
        batch.page_table,
        batch.page_size,
    )


def to_torch(batch: Batch, device: torch.device) -> tuple[torch.Tensor, BatchLayout]:
    """Input ids [T] and the layout that the torch models read."""
    starts, lengths = batch.starts, batch.lengths
    row_starts, row_lengths = starts.tolist(), lengths.tolist()
    num_decode = next((i for i, length in enumerate(row_lengths) if length != 1), len(row_lengths))
    count = -(-int((starts + lengths).max()) // batch.page_size)
    pages = batch.page_table[:, :count][batch.slots].astype(np.int64)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(row_of)) + (starts - np.cumsum(lengths) + lengths)[row_of]
    arrays = (
        batch.ids,
        starts,
        lengths,
        positions,
        pages,
        pages[row_of, positions // batch.page_size],
        positions % batch.page_size,
    )
    ids, *rest = (torch.from_numpy(array).to(device) for array in arrays)
    names = ("starts", "lengths", "positions", "page_table", "store_page", "store_offset")
    layout = BatchLayout(
        num_decode=num_decode,
        row_starts=row_starts,
        row_lengths=row_lengths,
        **dict(zip(names, rest, strict=True)),
    )
    return ids, layout
