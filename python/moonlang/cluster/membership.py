"""Keeps the router's list of servers in line with those that run here, whoever starts again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp
import msgspec

from moonlang.base import log
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError

TOKEN_HEADER = "x-moonlang-cluster-token"
ANSWER_S = 5.0
PERIOD_S = 1.0  # between two looks; while something is expected:
HURRY_S = 0.1
SILENCE_S = 10.0  # a router that is only started again is back by then

_log = log.get(__name__)


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A server as the router shows it. load: requests under way."""

    id: str
    url: str
    worker_type: str
    name: str = ""
    is_healthy: bool = False
    is_usable: bool = False
    is_leaving: bool = False
    load: int = 0
    problem: str = ""


class _Workers(msgspec.Struct):
    workers: list[Listed]


class Membership:
    """listed: what the router said last; heard_ns: when; reachable: at the last look. refused: why it does not talk to
    us, "" when it does. ours: the servers that it has from us.

    wanted: (role, name) of our servers by URL, asked for at every look; looked: called after each.
    """

    def __init__(
        self,
        router_url: str,
        token: str,
        wanted: Callable[[], Mapping[str, tuple[str, str]]],
        looked: Callable[[], None],
    ) -> None:
        self.listed: list[Listed] = []
        self.ours: dict[str, None] = {}
        self.heard_ns = monotonic_ns()
        self.reachable = False
        self.refused = ""
        self._url = f"{router_url}/workers"
        self._headers = {TOKEN_HEADER: token}
        self._wanted = wanted
        self._looked = looked
        self._wake = asyncio.Event()

    def healthy(self, url: str) -> bool:
        """Whether the router gives requests to this server."""
        return self.reachable and any(one.url == url and one.is_usable for one in self.listed)

    def hurry(self) -> None:
        """Something has changed: look now."""
        self._wake.set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        limit = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=limit) as session:
            while True:
                self._wake.clear()
                settled = False
                try:
                    settled = await self._look(session)
                    self.heard_ns, self.reachable, self.refused = monotonic_ns(), True, ""
                except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
                    self.reachable = False  # not there, or not yet
                except PeerError as error:
                    self.reachable, self.refused = False, str(error)
                self._looked()
                try:
                    async with asyncio.timeout(PERIOD_S if settled else HURRY_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def gone(self, url: str, patience_s: float) -> None:
        """Return when a server that is no longer wanted has no request any more. PeerError when that takes longer, or
        the router is gone."""
        deadline_ns = monotonic_ns() + int(patience_s * NS_PER_S)
        while url in self.ours or any(one.url == url for one in self.listed):
            if monotonic_ns() > deadline_ns:
                raise PeerError(f"The server {url} still has requests after {patience_s:g} s.")
            if monotonic_ns() - self.heard_ns > SILENCE_S * NS_PER_S:
                raise PeerError("The router does not answer.")
            self.hurry()
            await asyncio.sleep(HURRY_S / 2)

    async def _look(self, session: aiohttp.ClientSession) -> bool:
        """True when the router's list is as it should be."""
        async with session.get(self._url) as response:
            if response.status != 200:
                raise PeerError(f"The router does not show its servers (status {response.status}).")
            self.listed = msgspec.json.decode(await response.read(), type=_Workers).workers
        wanted, settled = dict(self._wanted()), True
        staying = {one.url: one.id for one in self.listed if not one.is_leaving}
        for url, (role, name) in wanted.items():
            self.ours[url] = None
            if url not in staying:
                settled = False
                body = {"url": url, "worker_type": role, "name": name}
                async with session.post(self._url, json=body) as response:
                    if response.status >= 400:
                        raise PeerError(f"The router does not take {name}: {(await response.text())[:500]}")
            elif not self.healthy(url):
                settled = False
        for url in [url for url in self.ours if url not in wanted]:
            if url in staying:
                settled = False
                async with session.delete(f"{self._url}/{staying[url]}"):
                    pass
            elif not any(one.url == url for one in self.listed):
                del self.ours[url]
            else:
                settled = False
        return settled
