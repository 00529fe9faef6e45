"""What both ends of a lane between hosts need: registered memory, checksums, and what travels beside the writes."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import mmap
import secrets
import socket
import struct
import threading
from typing import Final

import xxhash

from moonlang.base.clock import NS_PER_S
from moonlang.base.process_memory import TAG_BYTES
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.ring import HEADER_BYTES

RESUME_NS: Final = 5 * NS_PER_S  # for so long both ends keep a lane whose connection broke
UNACKNOWLEDGED_MS: Final = 800  # bytes that the peer's host does not take for so long end the connection
READ_BYTES: Final = 1 << 16
CARRIED_BYTES: Final = 4096  # a batch up to this size travels with its bell
BELL: Final = struct.Struct("<QQI")  # position behind the batch, its checksum, bytes of it that follow: all or none
GOODBYE: Final = BELL.pack(0, 0, 0)
CREDIT: Final = struct.Struct("<QQ")  # positions behind what was read, of ring and arena


class RegisteredMemory:
    """Zeroed memory that the transfer engine may write into, or read from."""

    def __init__(self, engine: Engine, size: int) -> None:
        mapping = mmap.mmap(-1, size)
        self.view = memoryview(mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        engine.register(self.address, size)


def prepare(sock: socket.socket) -> None:
    """Small messages leave at once; a peer whose host is gone is noticed within a second of the next bell."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        sock.setsockopt(socket.IPPROTO_TCP, option, 1)


class Site:
    """The transfer engine of an endpoint, and where peers can see that it is the one that was meant."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tag = secrets.token_bytes(TAG_BYTES)
        self._memory = ctypes.create_string_buffer(self.tag, TAG_BYTES)
        self._tag_address = ctypes.addressof(self._memory)
        engine.register(self._tag_address, TAG_BYTES)
        self.session = engine.session(self._tag_address)
        self._free: list[RegisteredMemory] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> RegisteredMemory:
        """Memory of that size. What was in use before is used again: late writes of a peer that was given up may
        still hit it, and must hit memory; the new user's checksums tell."""
        with self._lock:
            for memory in self._free:
                if len(memory.view) == size:
                    self._free.remove(memory)
                    memory.view[:HEADER_BYTES] = bytes(HEADER_BYTES)
                    return memory
        return RegisteredMemory(self.engine, size)

    def give_back(self, memory: RegisteredMemory) -> None:
        with self._lock:
            self._free.append(memory)

    def close(self) -> None:
        """All memory has been given back."""
        for memory in self._free:
            self.engine.unregister(memory.address)
        self.engine.unregister(self._tag_address)
        self.engine.close()


class Sums:
    """XXH3-64 that begins from a secret of two endpoints."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of(self, content: memoryview) -> int:
        return xxhash.xxh3_64_intdigest(content, self._seed)

    def of_parts(self, memory: memoryview, parts: list[tuple[int, int]]) -> int:
        if len(parts) == 1:
            ((offset, size),) = parts
            return xxhash.xxh3_64_intdigest(memory[offset : offset + size], self._seed)
        whole = xxhash.xxh3_64(seed=self._seed)
        for offset, size in parts:
            whole.update(memory[offset : offset + size])
        return whole.intdigest()


def sums_of(token: str, stream: bytes) -> Sums:
    """Both ends can compute the seed, and it never travels."""
    return Sums(int.from_bytes(hmac.digest(token.encode(), b"ring" + stream, hashlib.sha256)[:8], "little"))


def parts_between(start: int, end: int, ring_bytes: int) -> list[tuple[int, int]]:
    """Offsets and sizes of the ring between two positions: one part, or two where it wraps."""
    first, last = start % ring_bytes, end % ring_bytes
    if first < last or last == 0:
        return [(HEADER_BYTES + first, end - start)]
    return [(HEADER_BYTES + first, ring_bytes - first), (HEADER_BYTES, last)]
