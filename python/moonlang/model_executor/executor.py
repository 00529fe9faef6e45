"""Executors: who runs the ModelRunner. The thread lets the scheduler plan ahead, the inline one keeps one thread."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from moonlang.core.plan import StepPlan, StepResult
from moonlang.model_executor.progress import Progress


class Runner(Protocol):
    """What an executor needs of the ModelRunner."""

    def run(self, plan: StepPlan, progress: Progress) -> StepResult: ...


class _Mailbox:
    """Results on their way to the one thread that polls; `fd` is readable while there is something."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._items: deque[StepResult | BaseException] = deque()

    def put(self, item: StepResult | BaseException) -> None:
        self._items.append(item)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[StepResult]:
        """Everything that has arrived, in order. Raises an exception in its turn."""
        # First clear the event, then look: what arrives in between is announced once more, but never missed.
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        results: list[StepResult] = []
        while self._items:
            item = self._items[0]
            if isinstance(item, BaseException):
                if results:
                    os.eventfd_write(self.fd, 1)
                    return results
                raise item
            results.append(item)
            self._items.popleft()
        return results

    def close(self) -> None:
        os.close(self.fd)


class InlineExecutor:
    """Runs each plan inside `submit`. For plan depth 1, tests and tools."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._done = _Mailbox()
        self._progress = Progress(self._done.fd)

    def submit(self, plan: StepPlan) -> None:
        self._done.put(self._runner.run(plan, self._progress))

    def poll(self) -> Sequence[StepResult]:
        return self._done.take()

    def progress(self) -> tuple[int, int]:
        return self._progress.read()

    def fileno(self) -> int:
        return self._done.fd

    def close(self) -> None:
        self._done.close()


class ThreadExecutor:
    """Runs plans in one worker thread. An exception of the model stops the worker and comes out of `poll`."""

    def __init__(self, runner: Runner, depth: int = 2) -> None:
        self._runner = runner
        self._plans: queue.Queue[StepPlan | None] = queue.Queue(depth + 1)  # one more for the end mark
        self._done = _Mailbox()
        self._progress = Progress(self._done.fd)
        self._thread = threading.Thread(target=self._work, name="model-executor", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def poll(self) -> Sequence[StepResult]:
        return self._done.take()

    def progress(self) -> tuple[int, int]:
        return self._progress.read()

    def fileno(self) -> int:
        return self._done.fd

    def close(self) -> None:
        """Finish the plans in flight and stop the worker."""
        self._plans.put(None)
        self._thread.join()
        self._done.close()

    def _work(self) -> None:
        try:
            while (plan := self._plans.get()) is not None:
                self._done.put(self._runner.run(plan, self._progress))
        except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
            self._done.put(error)
