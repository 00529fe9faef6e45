"""The executor of one simulated server: plans one after the other, with progress by layers while one runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from moonlang.core.plan import StepPlan, StepResult
from moonlang.sim.executor import ChainExecutor
from moonlang.sim.pd.cells import SharedCells
from moonlang.sim.pd.process import Process


class Muscle:
    """Runs plans in order. `done`: results since the last `poll`; `progress`: (plan, layers written) while one runs.

    plan_ns: fixed cost of a plan; token_ns: cost of a token on top.
    """

    def __init__(
        self,
        executor: ChainExecutor,
        cells: SharedCells,
        process: Process,
        wake: Callable[[], None],
        *,
        num_layers: int,
        plan_ns: int,
        token_ns: int,
    ) -> None:
        self._executor = executor
        self._cells = cells
        self._process = process
        self._wake = wake
        self._num_layers = num_layers
        self._plan_ns, self._token_ns = plan_ns, token_ns
        self._queue: deque[StepPlan] = deque()  # the first one runs
        self._uncommitted: deque[StepPlan] = deque()
        self._done: list[StepResult] = []
        self.progress: tuple[int, int] = (-1, 0)

    def __len__(self) -> int:
        return len(self._queue) + len(self._uncommitted)

    @property
    def plans(self) -> list[StepPlan]:
        """The plans in flight, oldest first."""
        return [*self._uncommitted, *self._queue]

    def submit(self, plan: StepPlan) -> None:
        self._queue.append(plan)
        if len(self._queue) == 1:
            self._begin()

    def poll(self) -> list[StepResult]:
        done, self._done = self._done, []
        self._uncommitted.clear()
        return done

    def _begin(self) -> None:
        plan = self._queue[0]
        layered = bool(plan.report_layers)
        if layered:
            self._cells.stage()
        result = self._executor.run(plan)
        takes_ns = self._plan_ns + plan.num_tokens * self._token_ns
        if layered:
            for layer in range(self._num_layers):
                at_ns = takes_ns * (layer + 1) // (self._num_layers + 1)
                self._process.after(at_ns, lambda done=layer + 1: self._layer(plan, done))
        self._process.after(takes_ns, lambda: self._finish(result, takes_ns))

    def _layer(self, plan: StepPlan, done: int) -> None:
        """Layer `done` - 1 is written; every `report_layers`-th is told, and the last."""
        self._cells.advance(done)
        if done % plan.report_layers == 0 or done == self._num_layers:
            self.progress = (plan.plan_id, done)
            self._wake()

    def _finish(self, result: StepResult, takes_ns: int) -> None:
        self._cells.finish()
        self._uncommitted.append(self._queue.popleft())
        self._done.append(StepResult(plan_id=result.plan_id, rows=result.rows, forward_ns=takes_ns))
        if self._queue:
            self._begin()
        self._wake()
