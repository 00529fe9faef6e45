"""What the doctor says of shared libraries and of the backends that stand on them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from moonlang.base import registry
from moonlang.cli.check import Check
from moonlang.config import host
from moonlang.config.server_args import ServerArgs
from moonlang.mooncake import lib

# Kinds of backends whose files may lack something here, and the flag that chooses one.
KINDS = {
    "attention": "--attention-backend",
    "constrained": "--grammar-backend",
    "disaggregation": "--disaggregation-transfer-backend",
    "distributed": "the collectives of several ranks",
    "messaging": "--messaging-backend",
    "storage": "--hicache-storage-backend",
}
_CUDA_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


def run(args: ServerArgs) -> Iterator[Check]:
    for soname, package in lib.SYSTEM_LIBRARIES.items():
        yield _library(soname, package)
    yield _cuda_runtime(args)
    yield _kernels(args)
    for kind, flag in KINDS.items():
        yield from _backends(kind, flag)


def _library(soname: str, package: str) -> Check:
    """One that Mooncake's wheels link to. A server that does not use Mooncake runs without."""
    why = _why_not(soname)
    if not why:
        return Check(soname, "ok", "can be loaded")
    return Check(soname, "warning", f"{why}; Mooncake needs it", f"Run `apt-get install {package}`.")


def _cuda_runtime(args: ServerArgs) -> Check:
    found = next((name for name in _CUDA_RUNTIMES if not _why_not(name)), "")
    if found:
        return Check("libcudart", "ok", f"{found} can be loaded")
    if args.device == "cuda" or host.has_cuda():
        fix = "Run `pip install nvidia-cuda-runtime-cu12` (or -cu13), and put its lib folder into LD_LIBRARY_PATH."
        return Check("libcudart", "warning", "cannot be loaded; Mooncake's wheels for GPUs need it", fix)
    return Check("libcudart", "ok", "not there, and not needed without a GPU")


def _kernels(args: ServerArgs) -> Check:
    name = host.cpu_kernels()
    if name:
        return Check("sgl-kernel", "ok", f"CPU kernels for {name}")
    if args.device == "cuda" or host.has_cuda():
        return Check("sgl-kernel", "ok", "no CPU kernels, and not needed with a GPU")
    fix = "Install a C++ compiler (`apt-get install g++`) and run `pip install ./sgl-kernel`."
    return Check("sgl-kernel", "warning", "no CPU kernels: plain torch computes, several times slower", fix)


def _backends(kind: str, flag: str) -> Iterator[Check]:
    """One line for those that work, and one for each that does not."""
    reasons = {name: registry.why_not(kind, name) for name in registry.names(kind)}
    usable = [name for name, why in reasons.items() if not why]
    yield Check(kind, "ok", f"usable for {flag}: {', '.join(usable)}")
    for name, why in reasons.items():
        if why:
            yield Check(
                f"{kind} {name}",
                "warning",
                f"not usable: {why}",
                f"Or choose another for {flag}.",
            )


def _why_not(soname: str) -> str:
    """ "" when a shared library can be loaded; else the loader's words."""
    try:
        ctypes.CDLL(soname)
    except OSError as error:
        return str(error)
    return ""
