"""A prefill/decode deployment of one host by command lines, as a user would start it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import engines


@dataclass(frozen=True, slots=True)
class Deployment:
    """URLs of the public port and of the instances behind it."""

    router: str
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


@contextmanager
def serving_pairs(
    model: Path, logs: Path, *, prefill: int = 1, decode: int = 1, backend: str = "mooncake", options: str = ""
) -> Iterator[Deployment]:
    """Prefill and decode servers of `model` behind a router; everything is stopped at the end."""
    with ExitStack() as stack:

        def start(mode: str, index: int) -> str:
            command = (
                f"{engines.MOONLANG} --disaggregation-mode {mode} --disaggregation-transfer-backend {backend} {options}"
            )
            server = stack.enter_context(engines.serving(command, model, logs / f"{mode}{index}.log"))
            return f"http://127.0.0.1:{server.port}"

        prefills = tuple(start("prefill", i) for i in range(prefill))
        decodes = tuple(start("decode", i) for i in range(decode))
        router = f"{sys.executable} -m moonlang.router --pd-disaggregation --host 127.0.0.1 --port {{port}}"
        for url in prefills:
            router += f" --prefill {url}"
        for url in decodes:
            router += f" --decode {url}"
        front = stack.enter_context(engines.serving(router, model, logs / "router.log"))
        yield Deployment(f"http://127.0.0.1:{front.port}", prefills, decodes)
