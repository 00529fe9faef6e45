"""Rounding the number of tokens of a forward up, so that few different shapes occur.

oneDNN, which multiplies 16-bit matrices on CPU, compiles a kernel per shape: about half a millisecond for each of a
model's products and a quarter of a megabyte, kept. With every token count its own shape a busy server pays that in most
steps and grows by a gigabyte. The tokens that fill a bucket up are written to page 0, which is nobody's.
"""

from __future__ import annotations

_STEPS = ((16, 1), (64, 8), (256, 16), (1024, 64))  # up to so many tokens: multiples of that
_LAST_STEP = 128


def bucket(tokens: int) -> int:
    """The number of tokens to compute instead of `tokens`: exact up to 16, above on average a twentieth more."""
    step = next((step for limit, step in _STEPS if tokens <= limit), _LAST_STEP)
    return -(-tokens // step) * step


def exact(tokens: int) -> int:
    """No rounding: for devices and dtypes whose kernels take any shape."""
    return tokens
