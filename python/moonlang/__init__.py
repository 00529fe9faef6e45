"""MoonLang: an SGLang-compatible engine for serving large language models, with Mooncake wired into every subsystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moonlang.version import __version__

if TYPE_CHECKING:
    from moonlang.cluster.handle import Cluster
    from moonlang.config.server_args import ServerArgs
    from moonlang.entrypoints.engine import Engine

__all__ = ["Cluster", "Engine", "ServerArgs", "__version__"]

# Loaded on first use, so that `import moonlang` stays cheap and needs no torch.
_LAZY = {
    "Cluster": "moonlang.cluster.handle",
    "Engine": "moonlang.entrypoints.engine",
    "ServerArgs": "moonlang.config.server_args",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moonlang' has no attribute {name!r}")
