"""The real-time loop: when it steps, when it sleeps, when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.wakeup import Wakeup
from moonlang.core.messages import StopHit
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.role import NEVER_NS, drive
from moonlang.roles.watchdog import Watchdog

DEADLINE_S = 60.0


class Counter:
    """Steps are counted; `wake` says when to be called again."""

    def __init__(self, endpoint: InprocEndpoint, wake: Callable[[int], int]) -> None:
        self.wakeup = Wakeup()
        self.wait_fds = (self.wakeup.fileno(),)
        self.steps = 0
        self.messages = 0
        self.stepped = threading.Condition()
        self._endpoint = endpoint
        self._wake = wake

    def step(self, now_ns: int) -> int:
        with self.stepped:
            self.steps += 1
            self.messages += len(self._endpoint.recv())
            self.wakeup.clear()
            self.stepped.notify_all()
        return self._wake(now_ns)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.stepped:
            assert self.stepped.wait_for(condition, DEADLINE_S)

    def ready_body(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.wakeup.close()


class Driven:
    """A role in a loop on a thread."""

    def __init__(self, wake: Callable[[int], int], timeout_s: float = 0.0) -> None:
        self.hub = Hub(("a", "b"))
        self.endpoint = InprocEndpoint("a", self.hub)
        self.role = Counter(self.endpoint, wake)
        self.stop = Wakeup()
        self.heartbeat = Heartbeat(None, timeout_s)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        drive(self.role, self.endpoint, stop=self.stop, heartbeat=self.heartbeat)

    def end(self) -> None:
        self.stop.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.role.close()
        self.hub.close()
        self.stop.close()


@pytest.fixture
def sleeper() -> Iterator[Driven]:
    driven = Driven(lambda now_ns: NEVER_NS)
    yield driven
    driven.end()


def test_a_message_wakes_a_sleeping_role(sleeper: Driven) -> None:
    sleeper.role.wait_for(lambda: sleeper.role.steps == 1)
    InprocEndpoint("b", sleeper.hub).send("a", StopHit("x"))
    sleeper.role.wait_for(lambda: sleeper.role.messages == 1)
    assert sleeper.role.steps == 2


def test_a_descriptor_of_the_role_wakes_it(sleeper: Driven) -> None:
    sleeper.role.wait_for(lambda: sleeper.role.steps == 1)
    sleeper.role.wakeup.set()
    sleeper.role.wait_for(lambda: sleeper.role.steps == 2)


def test_a_wake_time_is_kept() -> None:
    started = monotonic_ns()
    driven = Driven(lambda now_ns: now_ns + 10 * NS_PER_MS)
    driven.role.wait_for(lambda: driven.role.steps >= 4)
    assert monotonic_ns() - started >= 30 * NS_PER_MS
    driven.end()


def test_a_busy_role_is_stepped_without_a_pause_and_still_stops() -> None:
    driven = Driven(lambda now_ns: now_ns)
    driven.role.wait_for(lambda: driven.role.steps > 1000)
    driven.end()


def test_an_idle_role_beats() -> None:
    driven = Driven(lambda now_ns: NEVER_NS, timeout_s=0.08)
    driven.role.wait_for(lambda: driven.role.steps >= 4)
    driven.end()


def test_a_heartbeat_is_late_only_after_it_began() -> None:
    heartbeat = Heartbeat(None, 2.0)
    assert not heartbeat.is_late(100 * NS_PER_S)
    heartbeat.beat(100 * NS_PER_S)
    assert not heartbeat.is_late(102 * NS_PER_S)
    assert heartbeat.is_late(102 * NS_PER_S + 1)
    heartbeat.close()


def test_no_timeout_means_never_late() -> None:
    heartbeat = Heartbeat(None, 0)
    heartbeat.beat(1)
    assert not heartbeat.is_late(10**6 * NS_PER_S)
    heartbeat.close()


def test_the_watchdog_names_the_late_role() -> None:
    hung: list[str] = []
    called = threading.Event()

    def on_hang(name: str) -> None:
        hung.append(name)
        called.set()

    heartbeats = {"fine": Heartbeat(None, 3600), "late": Heartbeat(None, 0.05)}
    for heartbeat in heartbeats.values():
        heartbeat.beat(monotonic_ns())
    watchdog = Watchdog(heartbeats, on_hang)
    assert called.wait(DEADLINE_S)
    watchdog.close()
    assert hung == ["late"]
