"""A mapping that has come is touched from end to end; others are left alone."""

import ctypes
import mmap
import threading

from moonlang.base import host_memory
from moonlang.mooncake import segment

SIZE = 64 << 20
END_S = 60.0


def touched(memory):
    """Bytes of the mapping that are in memory."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pages = SIZE // mmap.PAGESIZE
    states = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), states) == 0
    return sum(state & 1 for state in states) * mmap.PAGESIZE


def mapping():
    return mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def join():
    for thread in threading.enumerate():
        if thread.name == "kv-store-touch":
            thread.join(END_S)


def test_what_has_come_is_touched_and_nothing_else():
    old = mapping()
    before = segment.mapped()
    new = mapping()
    found = segment.Segment(before, SIZE)
    join()
    assert touched(new) == SIZE
    assert touched(old) == 0
    found.close()


def test_where_memory_is_short_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(host_memory, "free_bytes", lambda: segment.SPARED_BYTES - 1)
    before = segment.mapped()
    new = mapping()
    found = segment.Segment(before, SIZE)
    join()
    assert touched(new) == 0
    found.close()


def test_a_process_that_contributes_nothing():
    before = segment.mapped()
    new = mapping()
    segment.Segment(before, 0).close()
    assert touched(new) == 0


def test_mappings_that_the_kernel_has_made_one():
    assert list(segment.come([(10, 20), (40, 50)], [(10, 30), (35, 60), (70, 80)])) == [
        (20, 30),
        (35, 40),
        (50, 60),
        (70, 80),
    ]
    assert list(segment.come([(10, 20)], [(10, 20)])) == []
