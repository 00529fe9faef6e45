"""Ranks that share the experts of a model and nothing else (--enable-dp-attention): each serves requests of its own."""

from __future__ import annotations

import dataclasses

from moonlang.base import registry
from moonlang.base.errors import BugError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import Shard
from moonlang.core.ports import Executor, GrammarEngine
from moonlang.core.seat import Seat
from moonlang.distributed.bells import Bells
from moonlang.distributed.group import Group
from moonlang.model_executor.rounds import RoundExecutor
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.crew import placed
from moonlang.roles.experts import open_exchange


class Member:
    """One of these ranks. It plans by itself; its steps happen together with those of the others."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        """Waits for the other ranks. PeerError when one does not come."""
        self._bells = Bells(seat.plans, seat.rank, seat.size)
        self._group: Group = registry.find("distributed", seat.backend).BACKEND(seat)
        self._exchange = open_exchange(args, model, seat, self._group)
        if self._exchange is None:
            raise BugError("Ranks with tokens of their own have no exchange.")
        self._runner: ModelRunner
        self._args = placed(args)
        self._model = dataclasses.replace(model, experts_apart=Shard(seat.rank, seat.size))

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """All members make theirs at the same time."""
        self._runner = ModelRunner(self._model, self._args, grammars, exchange=self._exchange, expert_group=self._group)
        return self._runner

    def executor(self, depth: int) -> Executor:
        """What runs up to `depth` plans in flight."""
        return RoundExecutor(self._runner, depth, self._group, self._bells)
