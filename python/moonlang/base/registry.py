"""Backends are files: `find("messaging", "zmq")` imports `moonlang.messaging.zmq`; its name is the flag's value."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from moonlang.base.errors import ConfigError


def names(kind: str) -> list[str]:
    """The backends of one kind: the modules of package `moonlang.<kind>` that define BACKEND."""
    package = importlib.import_module(f"moonlang.{kind}")
    found = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return sorted(n for n in found if hasattr(importlib.import_module(f"moonlang.{kind}.{n}"), "BACKEND"))


def find(kind: str, name: str) -> ModuleType:
    """Import backend `name` of `kind`. ConfigError with the legal names when there is no such file."""
    module = f"moonlang.{kind}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise ConfigError(f"There is no {kind} backend {name!r}.", hint=f"Choose one of: {', '.join(names(kind))}.")
    return importlib.import_module(module)
