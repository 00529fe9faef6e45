"""XXH3-64 of memory, taken while it is copied."""

from __future__ import annotations

from typing import Any

from sgl_kernel._C import move_parts as _move_parts

STRIPE_BYTES = 64
LEAST_BYTES = 256


def move_parts(parts: Any, sums: Any) -> None:
    """sums[i] = XXH3-64 of the parts of page i, one after the other, which are copied in the same pass.

    parts: [n, k, 3] uint64: the address of each part, where it goes (0: it is only summed), and its bytes, a multiple
    of STRIPE_BYTES; a page has LEAST_BYTES or more. sums: [n] uint64. Runs in the calling thread, and lets others have
    the interpreter. Nothing checks that the memory is there.
    """
    _move_parts(parts, sums)
