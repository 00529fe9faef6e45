"""The worker role: a rank that computes its part of the model for the plans of rank 0. It decides nothing.

Of a pipeline's last stage the first rank chooses the tokens, and sends rank 0 the results.
"""

from __future__ import annotations

import gc
import select
from typing import Any

import msgspec

from moonlang.base import log
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan
from moonlang.core.seat import Seat
from moonlang.distributed.survivors import Survivors
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.crew import AGAIN_S, fewer, placed, sharded_runner
from moonlang.roles.grammars import grammar_engine
from moonlang.roles.plan_lines import PlanIn, plan_receiver, result_sender
from moonlang.roles.role import NEVER_NS

_LAST_PLANS_S = 4.0  # less than the supervisor gives its children

_log = log.get(__name__)


class WorkerRole:
    """See `roles.role.Role` for the contract."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        self._args, self._model = placed(args, seat.place), model
        self._plans: PlanIn | None = plan_receiver(args, seat)
        self._decoder = msgspec.msgpack.Decoder(StepPlan)
        tells = seat.stages > 1 and seat.chooses
        self._results = result_sender(seat) if tells else None
        self._grammars = grammar_engine(args, model) if tells else None
        self._encoder = msgspec.msgpack.Encoder()
        self._runner: ModelRunner | None
        self._runner, self._survivors = sharded_runner(args, model, seat, self._grammars)
        self._runner.warm_up()
        self._page_bytes, self._tokens = self._runner.schema.page_bytes, _tokens(self._runner)
        self._epoll = select.epoll()
        self._epoll.register(self._plans.fileno(), select.EPOLLIN)
        if self._survivors is not None:
            self._epoll.register(self._survivors.fileno(), select.EPOLLIN)
        self.wait_fds = (self._epoll.fileno(),)

    def ready_body(self) -> dict[str, Any]:
        return {"kv_page_bytes": self._page_bytes}

    def step(self, now_ns: int) -> int:
        """Run the plans that have come."""
        if self._survivors is None:
            self._run_plans()
            if self._ended:
                raise PeerError("Rank 0 has ended.")
            return NEVER_NS
        try:
            self._run_plans()
            lost = self._ended or self._survivors.broken
        except PeerError:
            lost = True
        if lost:
            self._go_on(self._survivors)
        return NEVER_NS

    def close(self) -> None:
        """Rank 0 finishes the plans in flight before it ends, and needs this rank for them."""
        deadline_ns = monotonic_ns() + int(_LAST_PLANS_S * NS_PER_S)
        while self._plans is not None and not self._ended and (left_ns := deadline_ns - monotonic_ns()) > 0:
            self._plans.wait(left_ns / NS_PER_S)
            self._run_plans()
        self._hang_up()
        self._epoll.close()
        if self._results is not None:
            self._results.close()
        if self._grammars is not None:
            self._grammars.close()

    @property
    def _ended(self) -> bool:
        return self._plans is not None and self._plans.ended

    def _run_plans(self) -> None:
        if self._plans is None or self._runner is None:
            return
        for frame in self._plans.recv():
            try:
                plan = self._decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise PeerError(f"A frame of {len(frame)} bytes is not a plan: {error}.") from error
            result = self._runner.run(plan)
            if self._results is not None:
                self._results.send(self._encoder.encode(result))

    def _go_on(self, survivors: Survivors) -> None:
        """With the ranks that are left; without work when they are more than can compute together."""
        while True:
            self._hang_up()
            self._runner = None
            gc.collect()  # weights and pages, before as much is taken again
            survivors.agree()
            if 0 not in survivors.members:
                raise PeerError("Rank 0 has ended.")
            if survivors.seat is None:
                _log.warning("This rank is not needed until another is lost.")
                return
            try:
                self._plans = plan_receiver(self._args, survivors.seat, AGAIN_S)
                args = fewer(self._args, survivors.seat, self._tokens)
                self._runner, _ = sharded_runner(args, self._model, survivors.seat, None, survivors)
                self._runner.warm_up()
                break
            except PeerError:
                if not survivors.shrunk:
                    raise
        survivors.met()
        self._epoll.register(self._plans.fileno(), select.EPOLLIN)

    def _hang_up(self) -> None:
        if self._plans is not None:
            self._epoll.unregister(self._plans.fileno())
            self._plans.close()
            self._plans = None


def _tokens(runner: ModelRunner) -> int:
    """That its pages hold."""
    return (runner.num_pages - 1) * runner.schema.page_size
