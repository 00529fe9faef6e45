"""A transfer engine with a buffer that another host may fill: does the way between two hosts carry data, how fast?"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np
import xxhash

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.process_memory import TAG_BYTES
from moonlang.mooncake import config, probe
from moonlang.mooncake.engine import MAX_ENTRY_BYTES, Engine, Peer

BUFFER_BYTES: Final = 16 << 20


class Card(msgspec.Struct, frozen=True):
    """Where a trial can be written to. tag: proves who answers; address: of BUFFER_BYTES bytes."""

    session: str
    tag: bytes
    address: int


class Trial:
    """host: the address of this machine on the way to the other one. ConfigError when no engine can be started."""

    def __init__(self, host: str, environ: Mapping[str, str] = os.environ) -> None:
        self._engine = Engine(config.read(environ, probe.hardware(), host=host))
        self._tag = ctypes.create_string_buffer(secrets.token_bytes(TAG_BYTES), TAG_BYTES)
        self._inbox = np.zeros(BUFFER_BYTES, np.uint8)
        self._outbox = np.tile(np.frombuffer(secrets.token_bytes(1 << 20), np.uint8), BUFFER_BYTES >> 20)
        self._engine.register(ctypes.addressof(self._tag), TAG_BYTES)
        self._engine.register(self._inbox.ctypes.data, BUFFER_BYTES)

    @property
    def card(self) -> Card:
        session = self._engine.session(ctypes.addressof(self._tag))
        return Card(session, self._tag.raw, self._inbox.ctypes.data)

    def write(self, to: Card) -> tuple[float, int]:
        """Fill the other's buffer: seconds, and the checksum it should have then. PeerError: out of reach."""
        offsets = np.arange(0, BUFFER_BYTES, MAX_ENTRY_BYTES, dtype=np.uint64)
        sizes = np.full(len(offsets), MAX_ENTRY_BYTES, np.uint64)
        source = np.uint64(self._outbox.ctypes.data) + offsets
        peer = Peer(to.session, to.tag)
        self._engine.reach(peer)  # meeting for the first time is no part of the measurement
        begin_ns = monotonic_ns()
        self._engine.write(peer, source, np.uint64(to.address) + offsets, sizes, lambda: None)
        return (monotonic_ns() - begin_ns) / NS_PER_S, xxhash.xxh3_64_intdigest(self._outbox.data)

    def received(self) -> int:
        """The checksum of what the buffer holds."""
        return xxhash.xxh3_64_intdigest(self._inbox.data)

    def close(self) -> None:
        self._engine.close()
