"""Asks bootstrap servers which prefill instances there are, on threads: names and HTTP may take their time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from moonlang.base.errors import PeerError
from moonlang.disaggregation import bootstrap
from moonlang.disaggregation.connection import Address

THREADS = 2

Found = Callable[[Address, tuple[Address, ...] | str], None]


class Finder:
    """`on_found(site, addresses or error)` is called from one of the finder's threads for every `look`."""

    def __init__(self, on_found: Found) -> None:
        self._on_found = on_found
        self._threads = ThreadPoolExecutor(THREADS, "kv-finder")

    def look(self, site: Address) -> None:
        self._threads.submit(self._look, site)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look(self, site: Address) -> None:
        try:
            known = bootstrap.instances(site)
            self._on_found(site, tuple(bootstrap.resolve((one.host or site[0], one.port)) for one in known))
        except PeerError as error:
            self._on_found(site, str(error))
