"""The thread pool: any number of threads, forks, callers at once, and silence when idle."""

import os
import select
import signal
import threading
import time

import pytest
import sgl_kernel as kernels
import torch

pytestmark = pytest.mark.parametrize("isa", ["generic"], indirect=True)  # the pool has one code for all


def work() -> tuple[torch.Tensor, torch.Tensor]:
    """One product through the pool and what it should be."""
    x, weight = torch.randn(9, 200), torch.randn(500, 200)
    y = torch.empty(9, 500)
    kernels.gemm(kernels.pack(weight, kind="f32"), x, y)
    return y, x @ weight.T


def right() -> bool:
    y, expected = work()
    return torch.allclose(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads):
    kernels.set_threads(threads)
    assert kernels.threads() == threads
    assert all(right() for _ in range(20))


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_refuses_odd_numbers(threads):
    with pytest.raises(ValueError, match="threads must be in"):
        kernels.set_threads(threads)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU only")
def test_pinned_workers_have_a_cpu_each_and_the_caller_has_all():
    allowed, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    kernels.set_threads(2, pin=True)
    try:
        assert right()
        (worker,) = set(os.listdir("/proc/self/task")) - before
        assert os.sched_getaffinity(int(worker)) == {sorted(allowed)[1]}
        assert os.sched_getaffinity(0) == allowed
    finally:
        kernels.set_threads(2)


def test_an_idle_pool_uses_no_cpu():
    kernels.set_threads(4)
    assert right()
    waiting = select.poll()  # of nothing: a pause of the whole thread, so that only the pool could use the CPU
    waiting.poll(50)
    before = time.process_time()
    waiting.poll(400)
    assert time.process_time() - before < 0.02


def test_a_forked_child_computes_too():
    x, packed = torch.randn(9, 200), kernels.pack(torch.randn(500, 200))
    expected, y = torch.empty(9, 500), torch.empty(9, 500)
    kernels.gemm(packed, x, expected)
    child = os.fork()
    if child == 0:  # torch's own threads do not survive a fork, so the child calls nothing of it that computes
        signal.alarm(20)  # a deadlock must end the child
        kernels.gemm(packed, x, y)
        os._exit(0 if y.tolist() == expected.tolist() and kernels.threads() == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right()


def test_many_callers_at_once():
    failures = []

    def call():
        failures.extend(1 for _ in range(30) if not right())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not failures
    assert not any(caller.is_alive() for caller in callers)
