"""Transfer between instances of one host, without Mooncake: prefill writes straight into decode's memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moonlang.base.checksum import Checksum
from moonlang.base.errors import ConfigError, PeerError
from moonlang.base.process_memory import Doorplate, ProcessMemory, host_key
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, Push
from moonlang.disaggregation import page_memory
from moonlang.disaggregation.channel import Contact, TransferChannel, TransferOptions, Work

SLICE_BYTES = 1 << 20  # written between two looks at whether to go on: 0.2 ms


class LocalMover:
    """See channel.Mover."""

    name = "local"

    def __init__(self, options: TransferOptions) -> None:
        self._checksum = options.checksum
        self._regions: Sequence[KvRegion] = ()
        self._plate: Doorplate | None = None
        self._peers: dict[str, ProcessMemory] = {}

    def register(self, regions: Sequence[KvRegion], instance: str) -> Sequence[Contact]:
        if not host_key():
            raise ConfigError(
                "--disaggregation-transfer-backend local does not work on this system.",
                hint="Use --disaggregation-transfer-backend mooncake.",
            )
        self._regions = regions
        self._plate = Doorplate(_tag(instance))
        return [Contact(handle=self._plate.handle) for _ in regions]

    def push(self, push: Push, work: Work) -> int:
        here = self._regions[push.source_rank]
        memory = self._memory(push.peer, push.target_rank)
        found = page_memory.cut(page_memory.runs(push, here, push.peer.regions[push.target_rank]), SLICE_BYTES)
        checksum = Checksum()
        slices = np.cumsum(found.sizes.astype(np.int64)) // SLICE_BYTES
        for some in np.split(np.arange(len(slices)), np.flatnonzero(np.diff(slices)) + 1):
            work.go_on()
            if self._checksum:  # slice by slice: what has been read is in the cache when it is copied
                for address, size in zip(found.source[some].tolist(), found.sizes[some].tolist(), strict=True):
                    checksum.add_memory(address, size)
            memory.write(found.source[some], found.target[some], found.sizes[some])
        return checksum.value() if self._checksum else 0

    def forget(self, instance: str) -> None:
        self._peers.pop(instance, None)

    def close(self) -> None:
        self._peers.clear()

    def _memory(self, peer: KvCard, rank: int) -> ProcessMemory:
        memory = self._peers.get(peer.instance)
        if memory is None:
            if peer.host != host_key():
                raise PeerError(
                    "The decode instance is on another host, or in another container.",
                    hint="Use --disaggregation-transfer-backend mooncake on both.",
                )
            memory = self._peers[peer.instance] = ProcessMemory(peer.handles[rank], _tag(peer.instance))
        return memory


def _tag(instance: str) -> bytes:
    return hashlib.sha256(instance.encode()).digest()


def open_transfer(options: TransferOptions) -> TransferChannel:
    """The KvTransfer of this backend."""
    return TransferChannel(LocalMover(options), options)


def _why_not() -> str:
    return "" if host_key() else "this system lets no process write into the memory of another"


BACKEND = open_transfer
PROBE = _why_not
