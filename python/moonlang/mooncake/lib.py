"""The only place that imports Mooncake: what it needs, what must be set before, what to say where it is missing."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
from types import MappingProxyType, ModuleType
from typing import Any, Final

from moonlang.base import log
from moonlang.base.errors import ConfigError

# Read once by the library when it is loaded. What the user has set wins.
ENVIRONMENT: Final = MappingProxyType(
    {
        "MC_LOG_LEVEL": "ERROR",
        # A peer that stops answering is given up after these, not after half a minute.
        "MC_TCP_STATUS_TIMEOUT_SEC": "3",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
        "MC_TRANSFER_TIMEOUT": "10",
        # By default the 2,049th entry in a queue fails, and the next ones with it.
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_TCP_SLICE_SIZE": "1048576",
    }
)
# The library looks for an own log folder, starts its logger twice then, and aborts the process.
DEADLY: Final = ("MC_LOG_DIR",)
# What the wheels link to and do not bring along: soname -> Debian package.
SYSTEM_LIBRARIES: Final = MappingProxyType(
    {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
)
WHEELS: Final = MappingProxyType(
    {
        "cpu": "mooncake-transfer-engine-non-cuda",
        "cuda12": "mooncake-transfer-engine",
        "cuda13": "mooncake-transfer-engine-cuda13",
    }
)
_log = log.get(__name__)


def transfer_engine() -> Any:
    """A new, uninitialised engine of the wheel. ConfigError when there is none; every call before its `initialize` is a
    segmentation fault, so it belongs into the hands of `mooncake.engine` only."""
    return _load("mooncake.engine").TransferEngine()


def store() -> Any:
    """A new client of the Mooncake store, not set up. ConfigError when there is none."""
    return _load("mooncake.store").MooncakeDistributedStore()


def placement(segment: str) -> Any:
    """Where a store is to put objects: in `segment` while there is room, "": anywhere."""
    found = _load("mooncake.store").ReplicateConfig()
    if segment:
        found.preferred_segment = segment
    return found


def complete() -> Any:
    """The status of a replica that can be read."""
    return _load("mooncake.store").ReplicaStatus.COMPLETE


def shared_segment() -> Any:
    """The class of memory that ranks of one host share. ConfigError when there is none."""
    return _load("mooncake.engine").SharedSegment


def version() -> str:
    """Name and version of the installed wheel; "" without one."""
    for wheel in WHEELS.values():
        try:
            return f"{wheel} {importlib.metadata.version(wheel)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def missing_libraries() -> list[str]:
    """Debian packages of the system libraries that cannot be loaded here."""
    missing = []
    for soname, package in SYSTEM_LIBRARIES.items():
        try:
            ctypes.CDLL(soname)
        except OSError:
            missing.append(package)
    return missing


def how_to_get() -> str:
    """What to do about a package or a library that is missing; "" when nothing is."""
    steps = []
    if not version():
        wheels = ", ".join(f"{extra} ({wheel})" for extra, wheel in WHEELS.items())
        steps.append(f"Run `pip install 'moonlang[cpu]'`, or with the extra for your GPU; one of: {wheels}.")
    if missing := missing_libraries():
        steps.append(f"Run `apt-get install {' '.join(missing)}`.")
    return " ".join(steps)


def _load(name: str) -> ModuleType:
    _prepare_environment()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = how_to_get() or "Install the wheel again: its files do not fit this system."
        raise ConfigError(f"Mooncake's transfer engine cannot be loaded: {error}.", hint=hint) from error


def _prepare_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in DEADLY:
        if os.environ.pop(name, None) is not None:
            _log.warning("%s is ignored: with it Mooncake's library aborts the process.", name)
