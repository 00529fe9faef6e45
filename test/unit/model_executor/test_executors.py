"""Executors: order, wake-ups, errors, closing."""

import select
import threading

import pytest

from moonlang.core.plan import StepPlan, StepResult
from moonlang.model_executor.executor import InlineExecutor, ThreadExecutor


class Runner:
    """Echoes plan ids; waits for `gate` before each plan; fails at plan `fails_at`."""

    def __init__(self, fails_at=-1):
        self.gate = threading.Semaphore(0)
        self.fails_at = fails_at
        self.thread = 0

    def run(self, plan, progress):
        assert self.gate.acquire(timeout=30)
        self.thread = threading.get_ident()
        if plan.plan_id == self.fails_at:
            raise RuntimeError("the model broke")
        return StepResult(plan.plan_id, ())


def plan(number):
    return StepPlan(number, 0, (), ())


def wait(executor):
    readable, _, _ = select.select([executor.fileno()], [], [], 30)
    assert readable
    return [result.plan_id for result in executor.poll()]


def is_readable(executor):
    return bool(select.select([executor.fileno()], [], [], 0)[0])


def test_thread_runs_plans_in_order_elsewhere():
    runner = Runner()
    executor = ThreadExecutor(runner)
    executor.submit(plan(0))
    executor.submit(plan(1))
    assert list(executor.poll()) == []
    assert not is_readable(executor)
    runner.gate.release()
    assert wait(executor) == [0]
    runner.gate.release()
    assert wait(executor) == [1]
    assert runner.thread != threading.get_ident()
    assert list(executor.poll()) == []
    assert not is_readable(executor)
    executor.close()


def test_an_exception_comes_out_of_poll_after_the_results_before_it():
    runner = Runner(fails_at=1)
    executor = ThreadExecutor(runner)
    executor.submit(plan(0))
    executor.submit(plan(1))
    runner.gate.release(2)
    results = []

    def collect_forever():
        while True:
            results.extend(wait(executor))

    with pytest.raises(RuntimeError, match="the model broke"):
        collect_forever()
    assert results == [0]
    with pytest.raises(RuntimeError):  # and again: a broken executor stays broken
        executor.poll()
    executor.close()


def test_close_finishes_what_is_in_flight():
    runner = Runner()
    executor = ThreadExecutor(runner)
    executor.submit(plan(0))
    runner.gate.release()
    executor.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "model-executor"]


def test_inline_runs_in_submit():
    runner = Runner()
    executor = InlineExecutor(runner)
    runner.gate.release(2)
    executor.submit(plan(0))
    executor.submit(plan(1))
    assert runner.thread == threading.get_ident()
    assert wait(executor) == [0, 1]
    assert not is_readable(executor)
    executor.close()
