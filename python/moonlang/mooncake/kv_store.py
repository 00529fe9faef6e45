"""The Mooncake store as HiCache's third tier: one object is a header and a page, without a copy on the way.

The client lives in this process. It contributes `global_segment_size` bytes to the store, or none. What it writes goes
there first, by a copy in memory; what others hold travels through the transfer engine. With `standalone_storage` a
`mooncake_client` process of this host owns the memory, and pages go through a staging buffer in its pool, since the
device pool is not part of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from moonlang.base import log
from moonlang.base.errors import ConfigError, PeerError
from moonlang.channels.moves import move, page_parts
from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.mooncake import lib, probe, segment, store_config
from moonlang.mooncake.lib import how_to_get as how_to_get
from moonlang.mooncake.near import Near
from moonlang.mooncake.store_config import StoreConfig
from moonlang.storage.channel import Headers, StoreChannel, StoreFullError, StoreOptions
from moonlang.storage.manifest import HEADER_BYTES

_log = log.get(__name__)

_OK: Final = 0
_NO_SPACE: Final = -200
_NOT_FOUND: Final = -704
_LATE: Final = -707  # all bytes have arrived, but its lease had run out before: it may have been overwritten meanwhile
_MEANINGS: Final = {
    _NO_SPACE: "it is full",
    -600: "it refuses the arguments (was its client restarted?)",
    -706: "the object is leased",
    _LATE: "the lease ran out before the object was read (see --default_kv_lease_ttl of mooncake_master)",
    -800: "a transfer failed",
    -900: "its master does not answer",
    -901: "its master does not answer in time",
    -1701: "this tenant is not registered",
}
_CONNECT_S = 2.0
_SETUP_ATTEMPTS = 3  # another random port each time: the last one may be registered under our name still


class _Buffers:
    """Where the parts of objects lie: object i of a call is header i and one page of every pool."""

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        """arrays: headers [N, header bytes], and the pools [P, shard bytes]."""
        self._arrays = arrays
        self._starts = [array.ctypes.data for array in arrays]
        self._sizes = [array.shape[1] for array in arrays]
        self.objects = len(arrays[0])
        self.object_bytes = sum(self._sizes)

    def headers(self, count: int) -> Bytes:
        """Of the first objects of a call, as they lie there now."""
        return self._arrays[0][:count, :HEADER_BYTES]

    def parts(self, i: int, page: int) -> list[Bytes]:
        header, *pools = self._arrays
        return [header[i], *(pool[page] for pool in pools)]

    def places(self, pages: Sequence[int], first: int = 0) -> tuple[list[list[int]], list[list[int]]]:
        """Addresses and sizes of the parts of each object. first: number of the first one within its call."""
        rows = ((i, *[page] * (len(self._sizes) - 1)) for i, page in enumerate(pages, first))
        places = [
            [start + at * size for start, at, size in zip(self._starts, row, self._sizes, strict=True)] for row in rows
        ]
        return places, [self._sizes] * len(pages)

    def gather(self, pages: Sequence[int]) -> None:
        """To be called before the objects are written ..."""

    def scatter(self, pages: Sequence[int], first: int = 0) -> None:
        """... and after they have been read."""

    def take(self, addresses: Sequence[int], pages: Sequence[int], headers: Headers) -> None:
        """Copy objects that lie somewhere in this process."""
        size, *_ = self._sizes
        for i, address in enumerate(addresses):
            ctypes.memmove(self._starts[0] + i * size, address, size)
        places = list(zip(self._starts[1:], self._sizes[1:], strict=True))
        behind = [address + size for address in addresses]
        headers.sums[: len(pages)] = move(page_parts(places, pages, behind, out=False))
        headers.summed[: len(pages)] = True


class _Staged(_Buffers):
    """Objects lie in a buffer of their own, [N, object bytes], and are copied from and to the others."""

    def __init__(self, outside: _Buffers, staging: Bytes) -> None:
        super().__init__([staging])
        self._outside = outside
        self._staging = staging

    def gather(self, pages: Sequence[int]) -> None:
        for i, page in enumerate(pages):
            np.concatenate(self._outside.parts(i, page), out=self._staging[i])

    def scatter(self, pages: Sequence[int], first: int = 0) -> None:
        for i, page in enumerate(pages, first):
            at = 0
            for part in self._outside.parts(i, page):
                part[:] = self._staging[i, at : at + len(part)]
                at += len(part)


class MooncakeStore:
    """A PageStore. Calls block: 4.3 s each while the master is gone, so the channel above keeps its distance then."""

    name = "mooncake"

    def __init__(self, config: StoreConfig) -> None:
        _check_reachable(config.client or config.master, "mooncake_client" if config.client else "mooncake_master")
        self._config = config
        before = segment.mapped()
        self._store = _connect(config)
        self._segment = segment.Segment(before, config.segment_bytes)
        self._placement = lib.placement(self._store.get_hostname() if config.segment_bytes else "")
        is_near = config.segment_bytes > 0 and not config.client
        self._near = Near(self._store, self._placement) if is_near else None
        # A put spins until its bytes have arrived.
        self._spinner = ThreadPoolExecutor(1, "kv-store-put", segment.stand_back)
        self._headers: Headers
        self._incoming: _Buffers
        self._outgoing: _Buffers

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        self._headers = headers
        incoming, outgoing = (_Buffers([each, *pools]) for each in (headers.read, headers.written))
        if self._config.client:
            incoming, outgoing = self._staged(incoming), self._staged(outgoing)
        else:
            for memory in (*pools, headers.read, headers.written):
                # Refused for memory that the shared engine has registered already, which is as good.
                self._store.register_buffer(memory.ctypes.data, memory.nbytes)
        self._incoming, self._outgoing = incoming, outgoing

    def leading(self, names: Sequence[str]) -> int:
        count = 0
        for answer in self._store.batch_is_exist(list(names)):
            if answer < 0:
                raise _failure("look up pages", answer)
            if not answer:
                break
            count += 1
        return count

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        near = self._near.addresses(names, self._incoming.object_bytes) if self._near is not None else []
        count = len(near)
        if near:
            self._incoming.take(near, pages[:count], self._headers)
        return count + self._fetch(names[count:], pages[count:], count) if count < len(names) else count

    def _fetch(self, names: Sequence[str], pages: Sequence[int], first: int) -> int:
        """Have the library read these objects, the first of which is number `first` of its call."""
        addresses, sizes = self._incoming.places(pages, first)
        headers = self._incoming.headers(first + len(names))[first:]
        headers[:] = 0
        answers = self._store.batch_get_into_multi_buffers(list(names), addresses, sizes)
        good = sum(sizes[0]), _LATE  # who is late is verified like everybody else
        count = next((i for i, answer in enumerate(answers) if answer not in good or not headers[i].any()), len(names))
        if count < len(names) and answers[count] < 0 and answers[count] != _NOT_FOUND and first + count == 0:
            raise _failure("read pages", answers[count])
        self._incoming.scatter(pages[:count], first)
        return count

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        self._outgoing.gather(pages)
        addresses, sizes = self._outgoing.places(pages)
        put = self._store.batch_put_from_multi_buffers
        answers = self._spinner.submit(put, list(names), addresses, sizes, self._placement).result()
        count = next((i for i, answer in enumerate(answers) if answer != _OK), len(names))
        if count < len(names) and answers[count] != _NO_SPACE:
            raise _failure("write pages", answers[count])
        if names and not count:
            raise StoreFullError("It has no room for more pages.")
        return count

    def discard(self, names: Sequence[str]) -> None:
        for name in names:
            answer = self._store.remove(name, True)
            if answer not in (_OK, _NOT_FOUND):
                raise _failure("remove a page", answer)

    def clear(self, prefix: str) -> None:
        answer = self._store.remove_by_regex(f"^{re.escape(prefix)}.*")
        if answer < 0:
            raise _failure("remove pages", answer)

    def close(self) -> None:
        self._spinner.shutdown()
        self._segment.close()
        self._store.close()

    def _staged(self, buffers: _Buffers) -> _Buffers:
        """The same through memory in the pool of the `mooncake_client`, which it can read and write."""
        size = buffers.objects * buffers.object_bytes
        address = self._store.alloc_from_mem_pool(size)
        if not address:
            raise ConfigError(
                f"The mooncake_client has no room for a staging buffer of {size} bytes.",
                hint="Give it a larger --global_segment_size.",
            )
        self._store.register_buffer(address, size)
        memory = (ctypes.c_uint8 * size).from_address(address)
        staging = np.ctypeslib.as_array(memory).reshape(buffers.objects, buffers.object_bytes)
        return _Staged(buffers, staging)


def open_store(options: StoreOptions) -> KvStore:
    """The store as flags, file and environment describe it; see `store_config`. ConfigError when it is not there."""
    config = store_config.read(options.extra, os.environ, probe.hardware(), host=options.host)
    return StoreChannel(MooncakeStore(config), options)


def _connect(config: StoreConfig) -> Any:
    """A client of the store, set up."""
    for _ in range(_SETUP_ATTEMPTS):
        store = lib.store()
        if config.client:
            answer = store.setup_dummy(config.segment_bytes, config.buffer_bytes, config.client)
        else:
            transfer = config.transfer
            answer = store.setup(
                transfer.local_hostname,
                transfer.metadata_server,
                config.segment_bytes,
                config.buffer_bytes,
                transfer.protocol,
                transfer.device_name,
                config.master,
                enable_ssd_offload=bool(config.ssd_path),
                ssd_offload_path=config.ssd_path,
                tenant_id=config.tenant,
            )
        if answer == _OK:
            return store
        _log.warning("The Mooncake store could not be set up (%d); trying again.", answer)
        store.close()
    raise ConfigError(
        f"The Mooncake store cannot be set up: {_MEANINGS.get(answer, f'error {answer}')}.",
        hint=f"Look at the logs of the master at {config.master} and of {config.transfer.metadata_server}.",
    )


def _check_reachable(address: str, program: str) -> None:
    """ConfigError unless somebody listens at HOST:PORT; an etcd:// list is the library's business."""
    if "://" in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No Mooncake service answers at {address!r}: {error}.", hint=f"Start `{program}`, or correct the address."
        ) from error


def _failure(what: str, code: int) -> PeerError:
    return PeerError(f"It cannot {what}: {_MEANINGS.get(code, 'it failed')} (error {code}).")
