"""Rank 0 of a pipeline: it computes the first stage of its plans, and their results come from the last one."""

from __future__ import annotations

import select
from collections.abc import Sequence

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import Executor
from moonlang.messaging.plan_line import PlanReceiver

_LAST_RESULTS_S = 4.0


class PipelineExecutor:
    """See core.ports.Executor. first: runs the first stage; its results say nothing, what it raises comes out here."""

    def __init__(self, first: Executor, results: PlanReceiver) -> None:
        self._first = first
        self._results = results
        self._decoder = msgspec.msgpack.Decoder(StepResult)
        self._in_flight = 0
        self._ready = select.epoll()
        self._ready.register(first.fileno(), select.EPOLLIN)
        self._ready.register(results.fileno(), select.EPOLLIN)

    def submit(self, plan: StepPlan) -> None:
        self._in_flight += 1
        self._first.submit(plan)

    def poll(self) -> Sequence[StepResult]:
        self._first.poll()
        found = [self._decoded(frame) for frame in self._results.recv()]
        self._in_flight -= len(found)
        if self._results.ended:
            raise PeerError("The last stage of the pipeline has ended.", hint="Start the server again.")
        return found

    def progress(self) -> tuple[int, int]:
        return self._first.progress()

    def fileno(self) -> int:
        return self._ready.fileno()

    def close(self) -> None:
        """Finish the plans in flight, in all stages: they would miss whom to tell."""
        self._first.close()
        deadline_ns = monotonic_ns() + int(_LAST_RESULTS_S * NS_PER_S)
        while self._in_flight and not self._results.ended and (left_ns := deadline_ns - monotonic_ns()) > 0:
            self._results.wait(left_ns / NS_PER_S)
            self._in_flight -= len(self._results.recv())
        self._ready.close()
        self._results.close()

    def _decoded(self, frame: bytes) -> StepResult:
        try:
            return self._decoder.decode(frame)
        except msgspec.DecodeError as error:
            raise PeerError(f"A frame of {len(frame)} bytes is not a result: {error}.") from error
