"""The part of the scheduler role that a server with a hierarchical cache has on top: host pool and store.

Each step brings the brain what the channels have completed, and at its end hands them what the brain wants done. The
store may be attached and detached while the server runs.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

from moonlang.base import log, registry
from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.errors import ConfigError
from moonlang.config.hicache import DEFAULT_RATIO, extra_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvRegion, unsharded
from moonlang.core.ports import HostPool, KvStore
from moonlang.core.storage import Clear, Demote, HostOp, Promote, StoreOp
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.mem_cache.tiers import Tiers
from moonlang.roles.role import NEVER_NS
from moonlang.roles.store_slot import StoreSlot, Told
from moonlang.storage.channel import StoreChannel, StoreOptions
from moonlang.storage.host_pool import HostMemory
from moonlang.storage.totals import StoreTotals

_log = log.get(__name__)

_GB = 10**9
_BATCH_BYTES = 32 << 20  # of pages handed down or read at once, so that nobody waits long for a turn
_BATCH_PAGES = (8, 64)  # the least and the most
_LOOK_NS = 500 * NS_PER_MS  # so often the store is looked at while it is at work: it may hang

OpenStore = Callable[[StoreOptions], KvStore]


def tier_config(args: ServerArgs, regions: Sequence[KvRegion], free_bytes: int) -> TierConfig:
    """The brain's part of the arguments. free_bytes: what the host pool may take of this machine's memory."""
    extra = extra_config(args)
    page_bytes = unsharded(regions).page_bytes
    ratio = args.hicache_ratio or DEFAULT_RATIO
    wanted = args.hicache_size * _GB // page_bytes if args.hicache_size else int(regions[0].num_pages * ratio)
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

    def __init__(self, args: ServerArgs, regions: Sequence[KvRegion], tiers: Tiers) -> None:
        """ConfigError when the store is not there or its configuration is wrong."""
        self._args = args
        self._regions = regions
        self._tiers = tiers
        self._host: HostPool = HostMemory(tiers.config.host_slots)
        self._host.register(regions)
        self._epoll = select.epoll()
        self._epoll.register(self._host.fileno(), select.EPOLLIN)
        self._slot = StoreSlot(self._epoll)
        self._under_way: dict[Ticket, tuple[int, HostOp | StoreOp]] = {}
        self._clears: dict[Ticket, Told] = {}
        if args.hicache_storage_backend is not None:
            self._slot.put(
                args.hicache_storage_backend, self._opener(args.hicache_storage_backend, extra_config(args))()
            )

    def fileno(self) -> int:
        """Readable when `take` has something."""
        return self._epoll.fileno()

    def take(self, now_ns: int) -> None:
        """Tell the brain what has been done."""
        if self._slot.is_changing:
            self._change(now_ns)
        if not (self._under_way or self._clears):
            return
        for completion in (*self._host.poll(), *self._slot.poll()):
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
                elif self._slot.is_usable:
                    self._under_way[self._slot.submit(op)] = number, op
                else:
                    gone = Completion(Ticket(number, ""), Outcome.FAILED, error="The store has been detached.")
                    self._tiers.completed(number, op, gone, now_ns)

    def wake_ns(self, now_ns: int) -> int:
        """When `take` is to be called although nothing is readable."""
        patience_ns = self._tiers.wake_ns(now_ns)
        look_ns = now_ns + _LOOK_NS if self._under_way or self._clears else NEVER_NS
        return min(look_ns, self._slot.wake_ns(), NEVER_NS if patience_ns is None else patience_ns)

    def report(self) -> dict[str, Any]:
        """What the store has done so far, for metrics."""
        totals = self._slot.store.totals if isinstance(self._slot.store, StoreChannel) else StoreTotals()
        return {"backend": self.backend, **asdict(totals)}

    # ---- at run time

    @property
    def backend(self) -> str:
        """The store that is in use, "": none."""
        return self._slot.name if self._slot.is_usable else ""

    def attach(self, backend: str, extra: dict[str, Any], told: Told, now_ns: int) -> None:
        """Begin to open a store; `told` hears how that ends. ConfigError when there is one already."""
        self._slot.attach(backend, self._opener(backend, extra), told, now_ns)

    def detach(self, told: Told, now_ns: int) -> None:
        """Use the store no more, and close it when its work is done; `told` hears of that. ConfigError when there is
        none."""
        self._slot.detach(told, now_ns)
        self._tiers.has_store = False
        self._change(now_ns)

    def clear(self, told: Told) -> None:
        """Remove every page of this model from the store; `told` hears of the end."""
        if not self._slot.is_usable:
            told(False, "No store is attached.")
            return
        self._tiers.forget_store()
        self._clears[self._slot.submit(Clear())] = told

    def close(self) -> None:
        self._epoll.close()
        self._host.close()
        self._slot.close()

    def _change(self, now_ns: int) -> None:
        """A store is on its way in or out."""
        at_work = bool(self._clears) or any(not isinstance(op, HostOp) for _, op in self._under_way.values())
        if self._slot.step(now_ns, at_work=at_work):
            self._tiers.forget_store()  # it is another one
            self._tiers.has_store = True

    def _opener(self, backend: str, extra: dict[str, Any]) -> Callable[[], KvStore]:
        """Opens that store. ConfigError when there is no such backend."""
        opener = cast(OpenStore, registry.find("storage", backend).BACKEND)
        model = self._args.served_model_name or os.path.basename(self._args.model_path or "model")
        batch_pages = self._tiers.config.batch_pages
        options = StoreOptions(model=model, host=self._args.host, extra=extra, batch_pages=batch_pages)

        def opened() -> KvStore:
            store = opener(options)
            store.register(self._regions)
            return store

        return opened


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
