"""Transfer between instances of one host, without Mooncake: the prefill instance maps decode's pool and copies into it.

Needs pools in shared memory (`KvPool` with `shared`), which both instances have when the backend is `local`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moonlang.base.errors import ConfigError, PeerError
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, Push
from moonlang.disaggregation import page_memory
from moonlang.disaggregation.channel import Contact, TransferChannel, TransferOptions, Work
from moonlang.disaggregation.page_memory import Bytes
from moonlang.disaggregation.same_host import attach, host_name

SLICE_BYTES = 1 << 20  # copied between two looks at whether to go on; 0.2 ms


class SharedMemoryMover:
    """See channel.Mover. Copy and checksum are one pass over the bytes."""

    name = "local"

    def __init__(self, options: TransferOptions) -> None:
        self._checksum = options.checksum
        self._pools: dict[tuple[str, int], Bytes] = {}  # by instance and rank

    def register(self, regions: Sequence[KvRegion]) -> Sequence[Contact]:
        if not all(region.handle for region in regions):
            raise ConfigError(
                "--disaggregation-transfer-backend local needs a KV pool in shared memory, which only a CPU has.",
                hint="Use --disaggregation-transfer-backend mooncake.",
            )
        return [Contact(handle=region.handle) for region in regions]

    def push(self, push: Push, source: Bytes, work: Work) -> int:
        target = self._attached(push.peer, push.target_rank)
        sums = np.zeros((len(push.spans), len(push.source)), np.uint64)
        for row, span in zip(sums, push.spans, strict=True):
            together = max(1, SLICE_BYTES // span.size)
            for at in range(0, len(push.source), together):
                work.go_on()
                some = slice(at, at + together)
                wanted = row[some] if self._checksum else None
                page_memory.copy(source, push.source[some], target, push.target[some], span, wanted)
        return page_memory.total(sums) if self._checksum else 0

    def forget(self, instance: str) -> None:
        self._pools = {key: pool for key, pool in self._pools.items() if key[0] != instance}

    def close(self) -> None:
        self._pools = {}

    def _attached(self, peer: KvCard, rank: int) -> Bytes:
        pool = self._pools.get((peer.instance, rank))
        if pool is None:
            if peer.host != host_name():
                raise PeerError(
                    "The decode instance is on another host, in another container, or runs as another user.",
                    hint="Use --disaggregation-transfer-backend mooncake on both.",
                )
            pool = self._pools[peer.instance, rank] = attach(peer.regions[rank], peer.handles[rank])
        return pool


def open_transfer(options: TransferOptions) -> TransferChannel:
    """The KvTransfer of this backend."""
    return TransferChannel(SharedMemoryMover(options), options)


BACKEND = open_transfer
