"""The names of SGLang's Python interface, served by MoonLang. Explicit, and without logic of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moonlang.version import __version__

if TYPE_CHECKING:
    from moonlang.config.server_args import ServerArgs
    from moonlang.entrypoints.engine import Engine

__all__ = ["Engine", "ServerArgs", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("moonlang"), name)
    raise AttributeError(f"module 'sglang' has no attribute {name!r} (this is the alias that MoonLang brings)")
