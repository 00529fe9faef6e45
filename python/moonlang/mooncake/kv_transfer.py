"""KV pages by Mooncake's transfer engine; between processes of one host by one copy from memory to memory.

Both are one-sided: prefill writes into decode's pool, which is registered once as a whole. Within a host one copy takes
a third of the time that the engine takes, which goes through TCP there as well: see docs/adr/0011.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from moonlang.base import log
from moonlang.base.checksum import Checksum
from moonlang.base.errors import BugError, PeerError
from moonlang.base.process_memory import TAG_BYTES, Doorplate, host_key
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, Push
from moonlang.disaggregation import page_memory
from moonlang.disaggregation.channel import Contact, TransferChannel, TransferOptions, Work
from moonlang.disaggregation.local import LocalMover
from moonlang.mooncake import config, probe
from moonlang.mooncake.engine import MAX_ENTRY_BYTES, Engine, Peer
from moonlang.mooncake.lib import how_to_get as how_to_get

_log = log.get(__name__)

NewEngine = Callable[[], Engine]


@dataclass(slots=True)
class _Known:
    """What is held of one instance. direct: its memory can be written directly; None: not tried yet."""

    direct: bool | None = None
    peers: dict[int, Peer] = field(default_factory=dict)  # by rank


class MooncakeMover:
    """See disaggregation.channel.Mover. same_host: use the direct path where it is possible."""

    name = "mooncake"

    def __init__(self, options: TransferOptions, new_engine: NewEngine, *, same_host: bool = True) -> None:
        self._options = options
        self._new_engine = new_engine
        self._local = LocalMover(options) if same_host and host_key() else None
        self._regions: Sequence[KvRegion] = ()
        self._engine: Engine | None = None
        self._plate: Doorplate | None = None
        self._known: dict[str, _Known] = {}  # each entry belongs to the lane of its instance

    def register(self, regions: Sequence[KvRegion], instance: str) -> Sequence[Contact]:
        self._regions = regions
        self._engine = engine = self._new_engine()
        self._plate = Doorplate(_tag(instance))
        engine.register(self._plate.address, TAG_BYTES)
        for region in regions:
            engine.register(region.address, region.num_pages * region.stride)
        session = engine.session(self._plate.address)
        handles = [""] * len(regions)
        if self._local is not None:
            handles = [contact.handle for contact in self._local.register(regions, instance)]
        return [Contact(session, handle) for handle in handles]

    def push(self, push: Push, work: Work) -> int:
        known = self._known.setdefault(push.peer.instance, _Known())
        if self._local is None or known.direct is False or not _same_host(push.peer):
            return self._push_by_engine(push, work, known)
        try:
            value = self._local.push(push, work)
        except PeerError as error:
            if known.direct:
                raise
            _log.warning("No direct path to a decode instance on this host: %s", error)
            known.direct = False
            return self._push_by_engine(push, work, known)
        known.direct = True
        return value

    def forget(self, instance: str) -> None:
        self._known.pop(instance, None)
        if self._local is not None:
            self._local.forget(instance)

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
        if self._engine is not None:
            self._engine.close()

    def _push_by_engine(self, push: Push, work: Work, known: _Known) -> int:
        if self._engine is None:
            raise BugError("A push was submitted before the pools were registered.")
        peer = known.peers.get(push.target_rank)
        if peer is None:
            session = push.peer.sessions[push.target_rank]
            peer = known.peers[push.target_rank] = Peer(session, _tag(push.peer.instance))
        here = self._regions[push.source_rank]
        found = page_memory.runs(push, here, push.peer.regions[push.target_rank])
        entries = page_memory.cut(found, MAX_ENTRY_BYTES)
        if not self._options.checksum:
            self._engine.write(peer, *entries, work.go_on)
            return 0
        reading = _Reading(entries, work.go_on)
        self._engine.write(peer, *entries, reading.go_on)
        return reading.checksum()


class _Reading:
    """Takes the checksum of what is being sent, an entry at a time, while others are on their way."""

    def __init__(self, entries: page_memory.Runs, go_on: Callable[[], None]) -> None:
        self._left = iter(zip(entries.source.tolist(), entries.sizes.tolist(), strict=True))
        self._go_on = go_on
        self._checksum = Checksum()

    def go_on(self) -> None:
        """Called before an entry is sent, also where one is sent again: only the order of the entries matters here."""
        self._go_on()
        for address, size in islice(self._left, 1):
            self._checksum.add_memory(address, size)

    def checksum(self) -> int:
        """Of all entries."""
        for address, size in self._left:
            self._checksum.add_memory(address, size)
        return self._checksum.value()


def _same_host(card: KvCard) -> bool:
    return card.host == host_key() and all(card.handles)


def _tag(instance: str) -> bytes:
    return hashlib.sha256(instance.encode()).digest()


def open_transfer(options: TransferOptions) -> TransferChannel:
    """The KvTransfer of --disaggregation-transfer-backend mooncake."""
    return TransferChannel(MooncakeMover(options, partial(_engine, options, force_tcp=False)), options)


def open_tcp_transfer(options: TransferOptions) -> TransferChannel:
    """The KvTransfer of --disaggregation-transfer-backend mooncake_tcp: TCP everywhere, also within a host."""
    new_engine = partial(_engine, options, force_tcp=True)
    return TransferChannel(MooncakeMover(options, new_engine, same_host=False), options)


def _engine(options: TransferOptions, *, force_tcp: bool) -> Engine:
    found = config.read(
        os.environ,
        probe.hardware(),
        host=probe.reachable(options.host),
        ib_device=options.devices or None,
        force_tcp=force_tcp,
    )
    probe.check_metadata(found)
    return Engine(found)
