"""What there is on this machine, found out without torch: the facts that `resolve` gets as an argument."""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import sys
from functools import cache
from pathlib import Path

from moonlang.config.resolve import HostFacts

_SEED_BITS = 30


def observe() -> HostFacts:
    """Look for a usable GPU, for the CPU kernels and at the processor, and draw a seed."""
    return HostFacts(
        cuda=has_cuda(),
        cpu_kernels=cpu_kernels(),
        rings=has_rings(),
        seed=secrets.randbits(_SEED_BITS),
    )


@cache
def cpu_kernels() -> str:
    """The instruction set that the installed CPU kernels use: "avx512", "avx2" or "generic"; "" without kernels."""
    try:
        from sgl_kernel.program import Program  # another package of this name has none
    except ImportError:
        return ""
    return Program.isa


def has_cuda() -> bool:
    """True when there is an NVIDIA device and the installed torch was built for it."""
    return Path("/dev/nvidiactl").exists() and not torch_version().endswith("+cpu")


def has_rings() -> bool:
    """True where stores become visible in order, and memory without a name can be handed on."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def torch_version() -> str:
    """The version of the installed torch without importing it; "+cpu" when there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "+cpu"
