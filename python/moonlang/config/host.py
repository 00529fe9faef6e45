"""What there is on this machine, found out without torch: the facts that `resolve` gets as an argument."""

from __future__ import annotations

import importlib.metadata
import secrets
from pathlib import Path

from moonlang.config.resolve import HostFacts

_SEED_BITS = 30


def observe() -> HostFacts:
    """Look for a usable GPU and draw a seed."""
    return HostFacts(cuda=has_cuda(), seed=secrets.randbits(_SEED_BITS))


def has_cuda() -> bool:
    """True when there is an NVIDIA device and the installed torch was built for it."""
    return Path("/dev/nvidiactl").exists() and not torch_version().endswith("+cpu")


def torch_version() -> str:
    """The version of the installed torch without importing it; "+cpu" when there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "+cpu"
