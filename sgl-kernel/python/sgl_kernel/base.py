"""Process-wide settings of the kernels, and the conversion of element types."""

from typing import Any

from sgl_kernel import _C


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "generic"."""
    return _C.isa()


def detected_isa() -> str:
    """The best instruction set of this machine."""
    return _C.detected_isa()


def force_isa(name: str) -> None:
    """Use another instruction set from the next call on. ValueError: unknown, or not on this machine."""
    _C.force_isa(name)


def threads() -> int:
    """Threads that run kernels, the caller included: MOONLANG_CPU_THREADS, or the CPUs this process may use."""
    return _C.threads()


def set_threads(n: int, pin: bool = False) -> None:
    """Let `n` threads (1 to 256) run kernels, the caller of a kernel included.

    pin: bind each of the others to one CPU, beginning with the second. Not while a kernel runs in another thread.
    """
    _C.set_threads(n, pin)


def convert(x: Any, y: Any) -> None:
    """Copy `x` [rows, columns] into `y` of the same shape and another element type, rounding to nearest even.

    To float32 from float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8; from float32 to bfloat16 or float16.
    """
    _C.convert(x, y)


def checksum(data: Any, seed: int = 0) -> int:
    """A 64-bit checksum of the bytes of a contiguous array: against damage, not against an adversary."""
    return _C.checksum(data, seed)
