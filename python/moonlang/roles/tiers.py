"""The part of the scheduler role that a server with a hierarchical cache has on top: host pool and store.

Each step brings the brain what the channels have completed, and at its end hands them what the brain wants done. The
store may be attached and detached while the server runs.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

from moonlang.base import log, registry
from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.errors import ConfigError
from moonlang.config.hicache import DEFAULT_RATIO, extra_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvRegion
from moonlang.core.ports import HostPool, KvStore
from moonlang.core.storage import Clear, Demote, HostOp, Promote, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.mem_cache.tiers import Tiers
from moonlang.roles.role import NEVER_NS
from moonlang.storage.channel import StoreChannel, StoreOptions
from moonlang.storage.host_pool import HostMemory
from moonlang.storage.totals import StoreTotals

_log = log.get(__name__)

_GB = 10**9
_BATCH_BYTES = 32 << 20  # of pages handed down or read at once, so that nobody waits long for a turn
_BATCH_PAGES = (8, 64)  # the least and the most
_LOOK_NS = 500 * NS_PER_MS  # so often the store is looked at while it is at work: it may hang

OpenStore = Callable[[StoreOptions], KvStore]
Control = Callable[[bool, str], None]  # told how a Clear ended


def tier_config(args: ServerArgs, device: KvRegion, free_bytes: int) -> TierConfig:
    """The brain's part of the arguments. free_bytes: what the host pool may take of this machine's memory."""
    extra = extra_config(args)
    page_bytes = device.schema.page_bytes
    ratio = args.hicache_ratio or DEFAULT_RATIO
    wanted = args.hicache_size * _GB // page_bytes if args.hicache_size else int(device.num_pages * ratio)
    slots = min(wanted, int(free_bytes * args.hicache_host_memory_fraction) // page_bytes)
    if slots < wanted:
        _log.warning("The host pool gets %d pages instead of %d: there is not more memory.", slots, wanted)
    default = TierConfig()
    return TierConfig(
        host_slots=slots,
        store=args.hicache_storage_backend is not None,
        write_policy=args.hicache_write_policy,
        prefetch_policy=args.hicache_storage_prefetch_policy,
        threshold_tokens=int(_number(extra, "prefetch_threshold", default.threshold_tokens)),
        timeout_ns=_seconds(extra, "prefetch_timeout_base", default.timeout_ns),
        timeout_ki_token_ns=_seconds(extra, "prefetch_timeout_per_ki_token", default.timeout_ki_token_ns),
        batch_pages=_batch_pages(page_bytes),
    )


class TierChannels:
    """Owns host pool and store of one server."""

    def __init__(self, args: ServerArgs, device: KvRegion, tiers: Tiers) -> None:
        """ConfigError when the store is not there or its configuration is wrong."""
        self._args = args
        self._device = device
        self._tiers = tiers
        self._host: HostPool = HostMemory(tiers.config.host_slots)
        self._host.register(device)
        self._epoll = select.epoll()
        self._epoll.register(self._host.fileno(), select.EPOLLIN)
        self._store: KvStore | None = None
        self._under_way: dict[Ticket, tuple[int, HostOp | StoreOp]] = {}
        self._clears: dict[Ticket, Control] = {}
        self.backend = ""
        if args.hicache_storage_backend is not None:
            self._open(args.hicache_storage_backend, extra_config(args))

    def fileno(self) -> int:
        """Readable when `take` has something."""
        return self._epoll.fileno()

    def take(self, now_ns: int) -> None:
        """Tell the brain what has been done."""
        if not (self._under_way or self._clears):
            return
        found = [*self._host.poll(), *(self._store.poll() if self._store is not None else ())]
        for completion in found:
            clear = self._clears.pop(completion.ticket, None)
            if clear is not None:
                clear(completion.outcome is Outcome.OK, completion.error)
                continue
            number, op = self._under_way.pop(completion.ticket)
            self._tiers.completed(number, op, completion, now_ns)

    def carry_out(self, now_ns: int) -> None:
        """Do what the brain wants done."""
        while ops := self._tiers.ops(now_ns):
            for number, op in ops:
                if isinstance(op, Demote | Promote):
                    self._under_way[self._host.submit(op)] = number, op
                elif self._store is not None:
                    self._under_way[self._store.submit(op)] = number, op
                else:
                    gone = Completion(Ticket(number, ""), Outcome.FAILED, error="The store has been detached.")
                    self._tiers.completed(number, op, gone, now_ns)

    def wake_ns(self, now_ns: int) -> int:
        """When `take` is to be called although nothing is readable."""
        if not (self._under_way or self._clears):
            return NEVER_NS
        patience_ns = self._tiers.wake_ns(now_ns)
        return min(now_ns + _LOOK_NS, NEVER_NS if patience_ns is None else patience_ns)

    def report(self) -> dict[str, Any]:
        """What the store has done so far, for metrics."""
        totals = self._store.totals if isinstance(self._store, StoreChannel) else StoreTotals()
        return {"backend": self.backend, **asdict(totals)}

    # ---- at run time

    def attach(self, backend: str, extra: dict[str, Any]) -> None:
        """ConfigError when there is a store already, or this one cannot be opened."""
        if self._store is not None:
            raise ConfigError(f"The store {self.backend} is attached.", hint="Detach it first.")
        self._open(backend, extra)
        self._tiers.has_store = True

    def detach(self) -> None:
        """ConfigError when there is none, or it is at work."""
        if self._store is None:
            raise ConfigError("No store is attached.")
        if self._under_way or self._clears:
            raise ConfigError("The store is at work.", hint="Try again when the server is idle.")
        self._epoll.unregister(self._store.fileno())
        self._store.close()
        self._store, self.backend = None, ""
        self._tiers.has_store = False

    def clear(self, told: Control) -> None:
        """Remove every page of this model from the store; `told` hears of the end."""
        if self._store is None:
            told(False, "No store is attached.")
            return
        self._tiers.forget_store()
        self._clears[self._store.submit(Clear())] = told

    def close(self) -> None:
        self._epoll.close()
        self._host.close()
        if self._store is not None:
            self._store.close()

    def _open(self, backend: str, extra: dict[str, Any]) -> None:
        opener = cast(OpenStore, registry.find("storage", backend).BACKEND)
        model = self._args.served_model_name or os.path.basename(self._args.model_path or "model")
        batch_pages = self._tiers.config.batch_pages
        store = opener(StoreOptions(model=model, host=self._args.host, extra=extra, batch_pages=batch_pages))
        store.register(self._device)
        self._epoll.register(store.fileno(), select.EPOLLIN)
        self._store, self.backend = store, backend


def _batch_pages(page_bytes: int) -> int:
    least, most = _BATCH_PAGES
    return min(most, max(least, _BATCH_BYTES // page_bytes))


def _seconds(extra: dict[str, Any], key: str, default_ns: int) -> int:
    return int(_number(extra, key, default_ns / NS_PER_S) * NS_PER_S)


def _number(extra: dict[str, Any], key: str, default: float) -> float:
    value = extra.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"{key} is {value!r}.", hint="It must be a number, at least 0.")
    return value
