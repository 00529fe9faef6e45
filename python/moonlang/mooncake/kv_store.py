"""The Mooncake store as HiCache's third tier: one object is a header and a page, without a copy on the way.

The client lives in this process. It contributes `global_segment_size` bytes to the store, or none; local hits are
copies in memory, others come through the transfer engine. With `standalone_storage` a `mooncake_client` process of this
host owns the memory, and pages go through a staging buffer in its pool, since the device pool is not part of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from moonlang.base import log
from moonlang.base.errors import ConfigError, PeerError
from moonlang.channels.pages import Bytes
from moonlang.core.ports import KvStore
from moonlang.mooncake import lib, probe, store_config
from moonlang.mooncake.store_config import StoreConfig
from moonlang.storage.channel import StoreChannel, StoreFullError, StoreOptions

_log = log.get(__name__)

_OK: Final = 0
_NO_SPACE: Final = -200
_NOT_FOUND: Final = -704
_MEANINGS: Final = {
    _NO_SPACE: "it is full",
    -600: "it refuses the arguments (was its client restarted?)",
    -706: "the object is leased",
    -800: "a transfer failed",
    -900: "its master does not answer",
    -901: "its master does not answer in time",
    -1701: "this tenant is not registered",
}
_CONNECT_S = 2.0
_SETUP_ATTEMPTS = 3  # another random port each time: the last one may be registered under our name still


class MooncakeStore:
    """A PageStore. Calls block: 4.3 s each while the master is gone, so the channel above keeps its distance then."""

    name = "mooncake"

    def __init__(self, config: StoreConfig) -> None:
        _check_reachable(config.client or config.master, "mooncake_client" if config.client else "mooncake_master")
        self._config = config
        self._store = _connect(config)
        self._pool: Bytes
        self._headers: Bytes
        self._staging: Bytes | None = None

    def attach(self, pool: Bytes, headers: Bytes) -> None:
        self._pool, self._headers = pool, headers
        if self._config.client:
            self._staging = self._stage(len(headers), pool.shape[1])
            return
        for memory in (pool, headers):
            # Refused for memory that the shared engine has registered already, which is as good.
            self._store.register_buffer(memory.ctypes.data, memory.nbytes)

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
        addresses, sizes = self._places(pages)
        answers = self._store.batch_get_into_multi_buffers(list(names), addresses, sizes)
        whole = sum(sizes[0])
        count = next((i for i, answer in enumerate(answers) if answer != whole), len(names))
        if count < len(names) and answers[count] < 0 and answers[count] != _NOT_FOUND and count == 0:
            raise _failure("read pages", answers[count])
        if self._staging is not None:
            for i, page in enumerate(pages[:count]):
                self._headers[i] = self._staging[i, : self._headers.shape[1]]
                self._pool[page] = self._staging[i, self._headers.shape[1] :]
        return count

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        if self._staging is not None:
            for i, page in enumerate(pages):
                self._staging[i, : self._headers.shape[1]] = self._headers[i]
                self._staging[i, self._headers.shape[1] :] = self._pool[page]
        addresses, sizes = self._places(pages)
        answers = self._store.batch_put_from_multi_buffers(list(names), addresses, sizes)
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
        self._store.close()

    def _places(self, pages: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Addresses and sizes of header and page, per object."""
        header, page_bytes = self._headers.shape[1], self._pool.shape[1]
        if self._staging is not None:
            base = self._staging.ctypes.data
            step = self._staging.shape[1]
            starts = [base + i * step for i in range(len(pages))]
            return [[start, start + header] for start in starts], [[header, page_bytes]] * len(pages)
        headers, pool = self._headers.ctypes.data, self._pool.ctypes.data
        places = [[headers + i * header, pool + page * page_bytes] for i, page in enumerate(pages)]
        return places, [[header, page_bytes]] * len(pages)

    def _stage(self, objects: int, page_bytes: int) -> Bytes:
        """Memory in the pool of the `mooncake_client`, which it can read and write."""
        size = objects * (self._headers.shape[1] + page_bytes)
        address = self._store.alloc_from_mem_pool(size)
        if not address:
            raise ConfigError(
                f"The mooncake_client has no room for a staging buffer of {size} bytes.",
                hint="Give it a larger --global_segment_size.",
            )
        memory = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(memory).reshape(objects, -1)


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
