"""Runs of bytes: what a push copies, however its pages and spans lie."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from moonlang.base.checksum import Checksum
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard, Push, Span
from moonlang.disaggregation import page_memory

SCHEMA = KvSchema(num_layers=2, num_kv_heads=2, head_dim=4, page_size=2, dtype="float32", itemsize=4)
PAGES = 8


class Pool:
    """[PAGES, page bytes] of random bytes, and its region."""

    def __init__(self, seed: int) -> None:
        self.bytes = np.random.default_rng(seed).integers(0, 256, (PAGES, SCHEMA.page_bytes)).astype(np.uint8)
        self.region = KvRegion(address=self.bytes.ctypes.data, stride=SCHEMA.page_bytes, num_pages=PAGES, schema=SCHEMA)


def push(source: tuple[int, ...], target: tuple[int, ...], *spans: Span) -> Push:
    card = KvCard(instance="d", backend="x", host="", regions=(), sessions=(), handles=())
    return Push(room=1, peer=card, source=source, target=target, spans=spans, deadline_ns=0)


def carry_out(found: page_memory.Runs) -> None:
    for source, target, size in zip(*found, strict=True):
        ctypes.memmove(int(target), int(source), int(size))


WHOLE = Span(0, 0, SCHEMA.page_bytes)
HALF = SCHEMA.page_bytes // 2
SPLIT = (Span(0, HALF, 64), Span(64, 0, 32), Span(128, HALF + 64, 16))


@pytest.mark.parametrize("most", [1 << 20, 48, 7])
@pytest.mark.parametrize(
    ("source", "target", "spans"),
    [
        ((1, 2, 3), (4, 5, 6), (WHOLE,)),
        ((3, 1, 2), (0, 7, 4), (WHOLE,)),
        ((1, 2, 5), (3, 4, 6), SPLIT),
        ((2,), (2,), (Span(0, 0, HALF), Span(HALF, HALF, HALF))),
    ],
)
def test_bytes_arrive(source: tuple[int, ...], target: tuple[int, ...], spans: tuple[Span, ...], most: int) -> None:
    here, there, wanted = Pool(1), Pool(2), Pool(2)
    for page, goal in zip(source, target, strict=True):
        for span in spans:
            part = here.bytes[page, span.source : span.source + span.size]
            wanted.bytes[goal, span.target : span.target + span.size] = part
    found = page_memory.cut(page_memory.runs(push(source, target, *spans), here.region, there.region), most)
    assert found.sizes.max() <= most
    sent = Checksum()
    for address, size in zip(found.source.tolist(), found.sizes.tolist(), strict=True):
        sent.add_memory(address, size)
    carry_out(found)
    assert (there.bytes == wanted.bytes).all()
    assert page_memory.checksum(there.region, target, spans) == sent.value()


def test_neighbours_are_joined() -> None:
    here, there = Pool(1), Pool(2)
    found = page_memory.runs(push((1, 2, 3, 6), (4, 5, 6, 7), WHOLE), here.region, there.region)
    assert found.sizes.tolist() == [3 * SCHEMA.page_bytes, SCHEMA.page_bytes]


def test_a_changed_byte_changes_the_checksum() -> None:
    pool = Pool(1)
    before = page_memory.checksum(pool.region, (1, 3), SPLIT)
    pool.bytes[3, HALF + 70] ^= 1
    assert page_memory.checksum(pool.region, (1, 3), SPLIT) != before
