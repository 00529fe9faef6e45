"""An executor that has something else to attend to while no plan is there: ranks that may be lost."""

from __future__ import annotations

import queue
import select
from typing import Protocol

from moonlang.base.wakeup import Wakeup
from moonlang.core.plan import StepPlan
from moonlang.model_executor.executor import Runner, ThreadExecutor


class WatchedRunner(Runner, Protocol):
    """What the executor needs of its runner."""

    def fileno(self) -> int:
        """Readable when there is something to tend to."""
        ...

    def tend(self) -> None:
        """See to it, between two plans."""
        ...


class WatchingExecutor(ThreadExecutor):
    """See Executor."""

    def __init__(self, runner: WatchedRunner, depth: int) -> None:
        self._watched = runner
        self._filled = Wakeup()
        super().__init__(runner, depth)

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._filled.set()

    def close(self) -> None:
        """Finish the plans in flight and stop the worker."""
        self._plans.put(None)
        self._filled.set()
        self._thread.join()
        self._done.close()
        self._filled.close()

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._filled.fileno(), select.POLLIN)
        poll.register(self._watched.fileno(), select.POLLIN)
        try:
            while True:
                self._filled.clear()
                self._watched.tend()
                try:
                    plan = self._plans.get_nowait()
                except queue.Empty:
                    poll.poll()
                    continue
                if plan is None:
                    return
                self._done.put(self._watched.run(plan, self._progress))
        except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
            self._done.put(error)
