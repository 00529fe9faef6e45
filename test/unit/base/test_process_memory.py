"""One-sided writes into another process of this host."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from moonlang.base.errors import PeerError
from moonlang.base.process_memory import TAG_BYTES, Doorplate, ProcessMemory, host_key

TAG = bytes(range(TAG_BYTES))
PEER = """
import ctypes, sys
from moonlang.base.process_memory import Doorplate
plate = Doorplate(bytes(range(32)))
memory = ctypes.create_string_buffer(1 << 16)
print(plate.handle, ctypes.addressof(memory), flush=True)
for line in sys.stdin:
    at, size = map(int, line.split())
    print(memory.raw[at:at + size].hex(), flush=True)
"""


class Peer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.handle, address = self._line().split()
        self.address = int(address)

    def bytes_at(self, at: int, size: int) -> bytes:
        assert self.process.stdin
        self.process.stdin.write(f"{at} {size}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.end()


def write(memory: ProcessMemory, source: int, target: int, pieces: list[tuple[int, int, int]]) -> None:
    """pieces: (offset here, offset there, size)."""
    here, there, sizes = np.array(pieces, np.uint64).reshape(-1, 3).T
    memory.write(here + np.uint64(source), there + np.uint64(target), sizes)


def test_pieces_land_where_they_should(peer: Peer) -> None:
    data = ctypes.create_string_buffer(bytes(range(256)) * 16, 4096)
    memory = ProcessMemory(peer.handle, TAG)
    write(memory, ctypes.addressof(data), peer.address, [(0, 4096, 100), (1000, 0, 7), (50, 9000, 1)])
    assert peer.bytes_at(4096, 101) == data.raw[:100] + b"\0"
    assert peer.bytes_at(0, 8) == data.raw[1000:1007] + b"\0"
    assert peer.bytes_at(9000, 1) == data.raw[50:51]


def test_more_pieces_than_one_call_takes(peer: Peer) -> None:
    data = ctypes.create_string_buffer(os.urandom(6000), 6000)
    pieces = [(2 * i, 2 * (2999 - i), 2) for i in range(3000)]
    write(ProcessMemory(peer.handle, TAG), ctypes.addressof(data), peer.address, pieces)
    expected = np.frombuffer(data.raw, np.uint16)[::-1].tobytes()
    assert peer.bytes_at(0, 6000) == expected


def test_another_process_is_refused(peer: Peer) -> None:
    with pytest.raises(PeerError, match="another one"):
        ProcessMemory(peer.handle, bytes(TAG_BYTES))


def test_a_process_that_ended_is_noticed_before_anything_is_written(peer: Peer) -> None:
    memory = ProcessMemory(peer.handle, TAG)
    peer.end()
    data = ctypes.create_string_buffer(8)
    with pytest.raises(PeerError, match="gone"):
        write(memory, ctypes.addressof(data), peer.address, [(0, 0, 8)])


def test_memory_that_is_not_there_is_an_error(peer: Peer) -> None:
    data = ctypes.create_string_buffer(8)
    with pytest.raises(PeerError, match="cannot be reached"):
        write(ProcessMemory(peer.handle, TAG), ctypes.addressof(data), 4096, [(0, 0, 8)])


@pytest.mark.parametrize("handle", ["", "1", "a:b", "1:2:3"])
def test_what_is_no_handle_is_a_peer_error(handle: str) -> None:
    with pytest.raises(PeerError, match="no handle"):
        ProcessMemory(handle, TAG)


def test_a_tag_has_its_size() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Doorplate(b"short")


def test_the_host_key_is_the_same_for_both_processes() -> None:
    code = "from moonlang.base.process_memory import host_key; print(host_key())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_key() != ""
