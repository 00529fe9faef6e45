"""The pools of all ranks of one host, as rank 0 sees them: it maps the others', and moves the pages of all.

So one process talks to other instances, whatever the number of ranks: what another instance sees is one with several
regions (`KvCard.regions`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.shard import Shard
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.distributed.group import Group
from moonlang.model_executor.kv_pool import KvPool


@dataclass(frozen=True, slots=True)
class SharedPool:
    """own: this rank's pool. regions: in rank 0 those of all ranks, elsewhere its own. others: they stay mapped."""

    own: KvPool
    regions: tuple[KvRegion, ...]
    others: tuple[KvPool, ...] = ()


def private_pool(schema: KvSchema, num_pages: int, device: torch.device, config: ModelConfig) -> SharedPool:
    """A pool that nobody else sees."""
    pool = KvPool(schema, num_pages, device)
    return SharedPool(pool, (_region(pool, config, config.shard),))


def shared_pool(schema: KvSchema, num_pages: int, group: Group, config: ModelConfig) -> SharedPool:
    """A pool of this rank that rank 0 maps; every rank calls it. CPU only. PeerError when it cannot be mapped."""
    memory = os.memfd_create("moonlang-kv")
    pool = KvPool(schema, num_pages, memory=memory)
    handles = group.all_gather(torch.tensor([os.getpid(), memory]))
    regions, others = [_region(pool, config, config.shard)], []
    if group.rank == 0:
        for rank in range(1, group.size):
            process, descriptor = handles[rank].tolist()
            others.append(_mapped(f"/proc/{process}/fd/{descriptor}", schema, num_pages))
            regions.append(_region(others[-1], config, Shard(rank, group.size)))
    group.barrier()
    os.close(memory)
    return SharedPool(pool, tuple(regions), tuple(others))


def _mapped(path: str, schema: KvSchema, num_pages: int) -> KvPool:
    try:
        memory = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerError(f"The KV pool of a rank cannot be mapped: {path}: {error.strerror}.") from error
    try:
        return KvPool(schema, num_pages, memory=memory)
    finally:
        os.close(memory)


def _region(pool: KvPool, config: ModelConfig, shard: Shard) -> KvRegion:
    return pool.region(shard.kv_part(config.num_kv_heads).start)
