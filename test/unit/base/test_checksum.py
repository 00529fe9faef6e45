"""Checksums do not depend on how the bytes are cut."""

from __future__ import annotations

import ctypes
import os

from moonlang.base.checksum import Checksum


def test_pieces_add_up_to_the_whole() -> None:
    data = os.urandom(100_000)
    whole = Checksum()
    whole.add(data)
    memory = ctypes.create_string_buffer(data, len(data))
    pieces = Checksum()
    pieces.add_memory(ctypes.addressof(memory), 30_000)
    pieces.add(memoryview(data)[30_000:30_001])
    pieces.add_memory(ctypes.addressof(memory) + 30_001, 69_999)
    assert pieces.value() == whole.value()
    assert 0 <= whole.value() < 2**64


def test_order_and_every_byte_count() -> None:
    a, b = Checksum(), Checksum()
    a.add(b"ab")
    b.add(b"ba")
    assert a.value() != b.value()
    b = Checksum()
    b.add(b"ab\0")
    assert a.value() != b.value()
