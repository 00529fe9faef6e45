"""What the doctor looks at on this machine: Python, packages, processor, memory, port."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from moonlang.base import host_memory
from moonlang.cli.check import Check
from moonlang.config import alias, host
from moonlang.config.server_args import ServerArgs
from moonlang.roles import run_directory

PYTHON = (3, 11)
GIB = 1 << 30
MEMORY_BYTES = 2 * GIB
SHM_BYTES = 64 << 20
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# Package -> what it is for. Absence is no fault.
OPTIONAL = {
    "modelscope": "models from ModelScope (SGLANG_USE_MODELSCOPE)",
    "openai": "the Python client of the README",
}


def run(args: ServerArgs) -> Iterator[Check]:
    yield _python()
    yield _alias()
    yield from _packages()
    yield _processor()
    yield _gpu(args)
    yield _memory(Path("/"))
    yield _shared_memory(Path("/dev/shm"))
    yield _port(args)
    yield _left_behind(None)


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < PYTHON:
        return Check("python", "failed", f"{version} is too old", "Install Python 3.11 or newer.")
    return Check("python", "ok", f"{version} ({sys.executable})")


def _alias() -> Check:
    version = alias.other_sglang()
    if version is None:
        return Check("sglang alias", "ok", "no other package of this name")
    text = f"SGLang {version} is installed too, and MoonLang brings a package of the same name"
    return Check("sglang alias", "failed", text, "Run `pip uninstall sglang`, or use an environment of its own.")


def _packages() -> Iterator[Check]:
    """The distributions that MoonLang's own metadata names, with their versions."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("moonlang") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "warning", "MoonLang is not installed", "Run `pip install -e python`.")
        return
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = [text for text in map(_wrong, needed) if text]
    if wrong:
        yield Check("packages", "failed", "; ".join(wrong), "Run `pip install -e python -c constraints.txt`.")
    else:
        yield Check("packages", "ok", f"all {len(needed)} there; torch {host.torch_version()}")
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Check(name, "warning", f"not installed; for {purpose}", f"Run `pip install {name}` if you want it.")
        else:
            yield Check(name, "ok", version)


def _wrong(requirement: Requirement) -> str:
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} does not satisfy {requirement.specifier}"
    return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0))
    words = set(_cpu_flags(Path("/proc/cpuinfo")))
    found = [feature for feature in FEATURES if feature in words]
    text = f"{platform.machine()}, {cores} cores, {', '.join(found) or 'no vector extensions known here'}"
    if platform.machine() == "x86_64" and "avx2" not in words:
        return Check("processor", "warning", text, "It works, slowly: use a machine with AVX2 if you can.")
    return Check("processor", "ok", text)


def _cpu_flags(file: Path) -> list[str]:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])


def _gpu(args: ServerArgs) -> Check:
    if host.has_cuda():
        return Check("gpu", "ok", "an NVIDIA device, and a torch built for it")
    if args.device == "cuda":
        fix = "Leave out --device, or install the driver and a torch built for CUDA."
        return Check("gpu", "failed", "--device cuda, and no usable GPU", fix)
    return Check("gpu", "ok", "none; the model runs on the CPU")


def _memory(root: Path) -> Check:
    """What a server on the CPU may take: the least of what the host and the container leave."""
    available = host_memory.free_bytes(root)
    text = f"{available / GIB:.1f} GiB available"
    if available < MEMORY_BYTES:
        return Check("memory", "warning", text, "Stop other programs, or lower --max-total-tokens.")
    return Check("memory", "ok", text)


def _shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "warning", f"no {folder}", f"Mount a tmpfs at {folder}.")
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.2f} GiB free in {folder}"
    if free < SHM_BYTES:
        return Check("shared memory", "warning", text, "In a container: start it with --shm-size=1g.")
    return Check("shared memory", "ok", text)


def _port(args: ServerArgs) -> Check:
    where = f"{args.host}:{args.port}"
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            return Check("port", "failed", f"{where}: {error.strerror}", "Choose another with --port or --host.")
    return Check("port", "ok", f"{where} is free")


def _left_behind(base: Path | None) -> Check:
    """Sockets, jobs and shared memory of servers that were killed."""
    reaped = run_directory.reap(base)
    return Check("left behind", "ok", f"removed the files of {reaped} killed servers" if reaped else "nothing")
