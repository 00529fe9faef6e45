"""The path of the CPU kernels: a model written down as a `Program`, which computes a step in one call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import sgl_kernel
import torch
from sgl_kernel.cache import Unkept
from sgl_kernel.program import Program
from sgl_kernel.ranks import RankLostError

from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.distributed.group import Group
from moonlang.distributed.pipe import Pipe
from moonlang.kernels.expert_weights import Packed
from moonlang.kernels.program import Builder
from moonlang.model_executor.expert_layers import ProgramExperts
from moonlang.model_executor.kv_pool import KvPool
from moonlang.model_executor.layout import Batch, Ints
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.threads import kernel_threads, pin_kernel_threads
from moonlang.model_loader import open_model
from moonlang.model_loader.packed import packed_weights
from moonlang.models.spec import ModelSpec, torch_dtype
from moonlang.moe.eplb import ExpertLayer
from moonlang.moe.exchange.port import ExpertExchange


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RankLostError as lost:
        raise PeerError(f"{lost}.", hint="The model is spread over all ranks: start the server again.") from None


class ProgramHidden:
    """See plan_runner.Hidden. The states lie in the program's memory."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def logits(self, begin: int, end: int) -> torch.Tensor:
        with _peers():
            return torch.from_numpy(self._program.logits(begin, end))

    def best(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        with _peers():
            return self._program.best(begin, end)


class ProgramNetwork:
    """See plan_runner.Network."""

    def __init__(self, program: Program, pool: KvPool, size: int, dtype: torch.dtype, pipe: Pipe | None) -> None:
        """size, dtype: of hidden states. pipe: of a stage of a pipeline."""
        self._program = program
        self._size, self._dtype = size, dtype
        self._pipe = pipe
        self._pool = pool  # the program keeps its address only
        self._hidden = ProgramHidden(program)
        self._progress: Progress | None = None  # where the program reports; kept, since it knows the address only
        schema = pool.schema
        program.set_pool(pool.buffer.data_ptr(), pool.num_pages, schema.num_layers, schema.page_size, schema.dtype)

    def forward(self, batch: Batch, kept: Ints, progress: Progress | None) -> ProgramHidden | None:
        self._report(progress)
        rows = (batch.ids, batch.slots, batch.starts, batch.lengths, batch.page_table, np.asarray(kept))
        pipe = self._pipe
        if pipe is None:
            with _peers():
                self._program.run(*rows)
            return self._hidden
        states = torch.empty(len(batch.ids), self._size, dtype=self._dtype)
        if pipe.before is not None:
            states = pipe.take(states)
        with _peers():
            self._program.run(*rows, given=states.data_ptr())
        if pipe.after is None:
            return self._hidden
        self._program.hand_over(states.data_ptr())
        pipe.give(states)
        return None

    def _report(self, progress: Progress | None) -> None:
        if progress is not None:
            if progress is not self._progress:
                self._program.report_to(progress.address, progress.event)
                self._progress = progress
            self._program.report_every(progress.every, progress.base)
        elif self._progress is not None:
            self._program.report_every(0, 0)


class LoadedProgram:
    """See networks.Loaded."""

    def __init__(
        self,
        program: Program,
        weight_bytes: int,
        size: int,
        dtype: torch.dtype,
        processes: int = 1,
        expert_layers: Sequence[ExpertLayer] = (),
        packed: Packed | None = None,
    ) -> None:
        """size, dtype: of hidden states. processes: how many share the cores."""
        self.expert_layers = expert_layers
        self.packed = packed
        self._size, self._dtype = size, dtype
        self.weight_bytes = weight_bytes
        cores = len(os.sched_getaffinity(0))
        self.threads = kernel_threads(max(1, cores // processes), weight_bytes, os.environ)
        pinned = processes == 1 and pin_kernel_threads(cores, os.cpu_count() or cores, os.environ)
        sgl_kernel.set_threads(self.threads, pinned)
        self.how = f"CPU kernels for {sgl_kernel.isa()}"
        self._program = program

    def connect(self, pool: KvPool, pipe: Pipe | None = None) -> ProgramNetwork:
        return ProgramNetwork(self._program, pool, self._size, self._dtype, pipe)


def load(
    config: ModelConfig,
    spec: ModelSpec,
    load_format: str,
    group: Group | None = None,
    exchange: ExpertExchange | None = None,
    expert_group: Group | None = None,
    processes: int = 1,
    *,
    movable: bool = False,
    keep: bool = False,
    before: Packed | None = None,
) -> LoadedProgram:
    """Pack the weights, or find them packed, and write the program. Groups as in `networks.load`; processes: how many
    share the cores. movable: keep the checkpoint open, for experts that come to this rank later. keep: the packed
    weights for the next time, when they are `before`: then only experts that are missing have to be packed.

    NotLowerableError when the model has a part without a kernel.
    """
    model, parts = open_model(config, spec, load_format)
    with packed_weights(config, load_format) if before is None else Unkept() as packed:
        lanes = () if exchange is None else exchange.native
        ranks, expert_ranks = (None if one is None else one.native for one in (group, expert_group))
        build = Builder(config.dtype, parts, packed, ranks, lanes, expert_ranks, movable=movable, before=before)
        model.lower(build)
    heads = len(config.shard.part(config.num_heads))
    kv_heads = len(config.shard.kv_part(config.num_kv_heads))
    value_dim = config.hf["kv_lora_rank"] if config.latent else 0
    program = build.finish(heads=heads, kv_heads=kv_heads, head_dim=config.head_dim, value_dim=value_dim)
    layers = [ProgramExperts(one, config.expert_shard.rank) for one in build.layers] if movable else []
    size, dtype = config.hidden_size, torch_dtype(config.dtype)
    made = build.made if keep else None
    return LoadedProgram(program, build.weight_bytes, size, dtype, processes, layers, made)
