"""A decode instance's pool in another process: `python kv_peer.py BACKEND INSTANCE`, driven over its pipes."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from moonlang.base.registry import find
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard
from moonlang.core.ports import KvTransfer
from moonlang.disaggregation.channel import TransferChannel, TransferOptions
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.kv_transfer import MooncakeMover

SCHEMA = KvSchema(num_layers=4, num_kv_heads=2, head_dim=8, page_size=4, dtype="bfloat16", itemsize=2)
PAGES = 64
LAYER_BYTES = SCHEMA.page_bytes // SCHEMA.num_layers

Open = Callable[[TransferOptions], KvTransfer]


class Pool:
    """Pages in memory of their own, each byte of which can be looked at."""

    def __init__(self, pages: int = PAGES, schema: KvSchema = SCHEMA) -> None:
        size = pages * schema.page_bytes
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.region = KvRegion(address=self._address, stride=schema.page_bytes, num_pages=pages, schema=schema)

    def page(self, number: int) -> bytes:
        at = number * self.region.stride
        return self.memory[at : at + self.region.stride]

    def fill(self, data: bytes) -> None:
        self.memory[: len(data)] = data


def engine_only(options: TransferOptions) -> KvTransfer:
    """Mooncake without its direct path: what instances on different hosts use."""
    config = MooncakeConfig(local_hostname=options.host)
    return TransferChannel(MooncakeMover(options, lambda: Engine(config), same_host=False), options)


def opener(backend: str) -> Open:
    return engine_only if backend == "mooncake-engine" else find("disaggregation", backend).BACKEND


class KvPeer:
    """The other process, as the test sees it."""

    def __init__(self, backend: str, instance: str, environ: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, backend, instance],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )
        self.card = msgspec.json.decode(self._line(), type=KvCard)

    def page(self, number: int) -> bytes:
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


def main(backend: str, instance: str) -> None:
    pool = Pool()
    transfer = opener(backend)(TransferOptions(host="127.0.0.1"))
    card = transfer.register([pool.region], instance)
    _say(msgspec.json.encode(card).decode())
    for line in sys.stdin:
        _say(pool.page(int(line)).hex())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
