"""The worker role: a rank that computes its part of the model for the plans of rank 0. It decides nothing.

Of a pipeline's last stage the first rank chooses the tokens, and sends rank 0 the results.
"""

from __future__ import annotations

from typing import Any

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan
from moonlang.core.seat import Seat
from moonlang.roles.crew import sharded_runner
from moonlang.roles.grammars import grammar_engine
from moonlang.roles.plan_lines import plan_receiver, result_sender
from moonlang.roles.role import NEVER_NS

_LAST_PLANS_S = 4.0  # less than the supervisor gives its children


class WorkerRole:
    """See `roles.role.Role` for the contract."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        self._plans = plan_receiver(args, seat)
        self._decoder = msgspec.msgpack.Decoder(StepPlan)
        tells = seat.stages > 1 and seat.chooses
        self._results = result_sender(seat) if tells else None
        self._grammars = grammar_engine(args, model) if tells else None
        self._encoder = msgspec.msgpack.Encoder()
        self._runner = sharded_runner(args, model, seat, self._grammars)
        self._runner.warm_up()
        self.wait_fds = (self._plans.fileno(),)

    def ready_body(self) -> dict[str, Any]:
        return {"kv_page_bytes": self._runner.schema.page_bytes}

    def step(self, now_ns: int) -> int:
        """Run the plans that have come."""
        self._run_plans()
        if self._plans.ended:
            raise PeerError("Rank 0 has ended.")
        return NEVER_NS

    def close(self) -> None:
        """Rank 0 finishes the plans in flight before it ends, and needs this rank for them."""
        deadline_ns = monotonic_ns() + int(_LAST_PLANS_S * NS_PER_S)
        while not self._plans.ended and (left_ns := deadline_ns - monotonic_ns()) > 0:
            self._plans.wait(left_ns / NS_PER_S)
            self._run_plans()
        self._plans.close()
        if self._results is not None:
            self._results.close()
        if self._grammars is not None:
            self._grammars.close()

    def _run_plans(self) -> None:
        for frame in self._plans.recv():
            try:
                plan = self._decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise PeerError(f"A frame of {len(frame)} bytes is not a plan: {error}.") from error
            result = self._runner.run(plan)
            if self._results is not None:
                self._results.send(self._encoder.encode(result))
