"""Backends are files: `find("messaging", "zmq")` imports `moonlang.messaging.zmq`; its name is the flag's value.

A file defines BACKEND, and PROBE where it needs more than this package brings along: a function that says why it cannot
be used on this machine, or "".
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from moonlang.base.errors import ConfigError


def names(kind: str) -> list[str]:
    """The backends of one kind: the modules of package `moonlang.<kind>` that define BACKEND, usable here or not."""
    package = importlib.import_module(f"moonlang.{kind}")
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if _is_backend(kind, found.name))


def find(kind: str, name: str) -> ModuleType:
    """Import backend `name` of `kind`. ConfigError with the legal names when there is no such file."""
    module = f"moonlang.{kind}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise ConfigError(f"There is no {kind} backend {name!r}.", hint=f"Choose one of: {', '.join(names(kind))}.")
    return importlib.import_module(module)


def why_not(kind: str, name: str) -> str:
    """Why a backend cannot be used on this machine; "" when it can."""
    try:
        probe = vars(find(kind, name)).get("PROBE")
    except ImportError as error:
        return str(error)
    return probe() if probe else ""


def _is_backend(kind: str, name: str) -> bool:
    """One that cannot be imported is: only what backends stand on may be missing."""
    try:
        return "BACKEND" in vars(importlib.import_module(f"moonlang.{kind}.{name}"))
    except ImportError:
        return True
