"""From the rows of a plan to the tensors of one forward, without a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.attention.batch import BatchLayout
from moonlang.core.plan import Row
from moonlang.model_executor.slots import SlotTable


def build(
    rows: Sequence[Row], slots: NDArray[np.int64], table: SlotTable, page_size: int, device: torch.device
) -> tuple[torch.Tensor, BatchLayout]:
    """Input ids [T] and layout of `rows`, whose slot numbers are `slots` [B]. Their pages are in the table already."""
    row_starts = [row.start for row in rows]
    row_lengths = [row.length for row in rows]
    starts = np.array(row_starts, np.int64)
    lengths = np.array(row_lengths, np.int64)
    num_decode = _leading_ones(row_lengths)
    pages = table.pages_of(slots, -(-int((starts + lengths).max()) // page_size))
    if num_decode == len(rows):
        row_of = np.arange(len(rows))
        positions = starts
    else:
        row_of = np.repeat(np.arange(len(rows)), lengths)
        first = np.cumsum(lengths) - lengths
        positions = np.arange(row_of.shape[0]) + (starts - first)[row_of]
    tensors = (
        _input_ids(rows, slots, table, row_of, lengths),
        starts,
        lengths,
        positions,
        pages,
        pages[row_of, positions // page_size],
        positions % page_size,
    )
    ids, *rest = (torch.from_numpy(a).to(device) for a in tensors)
    names = ("starts", "lengths", "positions", "page_table", "store_page", "store_offset")
    layout = BatchLayout(
        num_decode=num_decode,
        row_starts=row_starts,
        row_lengths=row_lengths,
        **dict(zip(names, rest, strict=True)),
    )
    return ids, layout


def _leading_ones(lengths: list[int]) -> int:
    return next((i for i, length in enumerate(lengths) if length != 1), len(lengths))


def _input_ids(
    rows: Sequence[Row],
    slots: NDArray[np.int64],
    table: SlotTable,
    row_of: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The ids a row brings, or the slot's last sampled token where it brings none."""
    given = [row.tokens for row in rows]
    if not any(given):
        return table.last_token[slots]
    ids = np.empty(row_of.shape[0], np.int64)
    brought = np.repeat([bool(tokens) for tokens in given], lengths)
    ids[~brought] = table.last_token[slots[row_of[~brought]]]
    ids[brought] = np.fromiter(chain.from_iterable(given), np.int64, int(brought.sum()))
    return ids
