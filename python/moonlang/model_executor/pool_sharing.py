"""The pools of all ranks of one host, as rank 0 sees them: it maps the others', and moves the pages of all.

So one process talks to other instances, whatever the number of ranks: what another instance sees is one with several
regions (`KvCard.regions`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import msgspec
import torch

from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.shard import Shard
from moonlang.config.stage import Stage
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
    return SharedPool(pool, (_region(pool, config),))


def shared_pool(schema: KvSchema, num_pages: int, group: Group, config: ModelConfig) -> SharedPool:
    """A pool of this rank that rank 0 maps; every rank calls it. CPU only. PeerError when it cannot be mapped.

    group: all ranks of all stages, those of the first stage first.
    """
    memory = os.memfd_create("moonlang-kv")
    pool = KvPool(schema, num_pages, memory=memory)
    handles = group.all_gather(torch.tensor([os.getpid(), memory]))
    regions, others = [_region(pool, config)], []
    if group.rank == 0:
        for rank in range(1, group.size):
            process, descriptor = handles[rank].tolist()
            theirs = _of_rank(config, rank)
            part = msgspec.structs.replace(schema, num_layers=len(theirs.layers))
            others.append(_mapped(f"/proc/{process}/fd/{descriptor}", part, num_pages))
            regions.append(_region(others[-1], theirs))
    group.barrier()
    os.close(memory)
    return SharedPool(pool, tuple(regions), tuple(others))


def _of_rank(config: ModelConfig, rank: int) -> ModelConfig:
    """What another rank holds."""
    stage, shard = divmod(rank, config.shard.size)
    return replace(config, shard=Shard(shard, config.shard.size), stage=Stage(stage, config.stage.size))


def _mapped(path: str, schema: KvSchema, num_pages: int) -> KvPool:
    try:
        memory = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerError(f"The KV pool of a rank cannot be mapped: {path}: {error.strerror}.") from error
    try:
        return KvPool(schema, num_pages, memory=memory)
    finally:
        os.close(memory)


def _region(pool: KvPool, config: ModelConfig) -> KvRegion:
    """config: of the rank that the pool belongs to."""
    return pool.region(config.shard.kv_part(config.num_kv_heads).start, config.layers.start)
