"""Any PageStore with faults, drawn from a seed: what stores do on bad days. The channel above must turn all of it into
misses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moonlang.base.errors import PeerError
from moonlang.channels.pages import Bytes
from moonlang.storage.channel import Headers, PageStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per call (fail, slow) or per object read (the others)."""

    seed: int = 0
    fail: float = 0.0  # the call raises
    slow: float = 0.0  # the call waits
    flip: float = 0.0  # a bit of the page is another
    header: float = 0.0  # a bit of the header is another
    cut: float = 0.0  # the end of the page has not arrived
    swap: float = 0.0  # another page comes, with its own header
    replay: float = 0.0  # the bytes of another page come under the right header
    drop: float = 0.0  # it is not there after all


class FaultyStore:
    """wait: called for a slow call, blocks as long as the test wants. known: names that `swap` may bring."""

    def __init__(
        self, store: PageStore, faults: Faults, wait: Callable[[], None] = lambda: None, known: Sequence[str] = ()
    ) -> None:
        self.name = store.name
        self.faults = faults
        self._store = store
        self._wait = wait
        self._rng = random.Random(faults.seed)
        self._known = list(known)
        self._pools: Sequence[Bytes]
        self._headers: Headers

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        self._pools, self._headers = pools, headers
        self._store.attach(pools, headers)

    def leading(self, names: Sequence[str]) -> int:
        self._call()
        return self._store.leading(names)

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        self._call()
        for i in range(len(names)):
            if self._happens(self.faults.drop):
                names, pages = names[:i], pages[:i]
                break
        names = [self._another() if self._happens(self.faults.swap) else name for name in names]
        count = self._store.read(names, pages) if names else 0
        self._headers.summed[:] = False  # what happens to the pages now would not be seen
        for i in range(count):
            self._damage(i, pages[i])
        return count

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        self._call()
        self._known += names
        return self._store.write(names, pages)

    def discard(self, names: Sequence[str]) -> None:
        self._call()
        self._store.discard(names)

    def clear(self, prefix: str) -> None:
        self._call()
        self._store.clear(prefix)

    def close(self) -> None:
        self._store.close()

    def _call(self) -> None:
        if self._happens(self.faults.slow):
            self._wait()
        if self._happens(self.faults.fail):
            raise PeerError("A fault that was asked for.")

    def _damage(self, i: int, page: int) -> None:
        part = self._rng.choice(self._pools)[page]
        if self._happens(self.faults.flip):
            part[self._rng.randrange(len(part))] ^= 1 << self._rng.randrange(8)
        if self._happens(self.faults.cut):
            part[self._rng.randrange(len(part)) :] ^= 0x5A
        if self._happens(self.faults.replay):
            part ^= 0xA5
        if self._happens(self.faults.header):
            self._headers.read[i, self._rng.randrange(100)] ^= 1 << self._rng.randrange(8)

    def _another(self) -> str:
        return self._rng.choice(self._known) if self._known else "nothing"

    def _happens(self, probability: float) -> bool:
        return self._rng.random() < probability
