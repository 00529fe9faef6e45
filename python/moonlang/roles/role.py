"""A role reads its mailbox: `step(now_ns) -> wake_ns`. A real-time loop or a simulator drives it."""

from __future__ import annotations

from collections.abc import Sequence
from os import getpid
from typing import Any, Protocol

from moonlang.base.clock import monotonic_ns
from moonlang.base.errors import BugError
from moonlang.base.wakeup import Wakeup
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Ready
from moonlang.core.ports import Endpoint
from moonlang.core.seat import Seat
from moonlang.roles import topology
from moonlang.roles.heartbeat import Heartbeat

NEVER_NS = 2**63 - 1  # a wake time: only a message wakes this role


class Role(Protocol):
    """What runs in one process."""

    @property
    def wait_fds(self) -> Sequence[int]:
        """Descriptors besides the mailbox that end a wait (an executor's results); fixed after construction."""
        ...

    def step(self, now_ns: int) -> int:
        """Handle everything that has arrived; return when to be called again at the latest."""
        ...

    def ready_body(self) -> dict[str, Any]:
        """What the API server reports about this role, as plain JSON values. Called once, after construction."""
        ...

    def close(self) -> None:
        """Free what the role holds. The endpoint belongs to the driver."""
        ...


def create(name: str, args: ServerArgs, model: ModelConfig, endpoint: Endpoint, seat: Seat | None = None) -> Role:
    """Construct role `name`. Its imports happen here: the detokenizer must not pay for torch.

    seat: of a role that computes, when there are several.
    """
    if name in topology.schedulers(args):
        from moonlang.roles.scheduler import SchedulerRole

        return SchedulerRole(args, model, endpoint, seat)
    if name in topology.detokenizers(args):
        from moonlang.roles.detokenizer import DetokenizerRole

        return DetokenizerRole(args, model, endpoint)
    if seat is not None and topology.rank(name, args) is not None:
        from moonlang.roles.worker import WorkerRole

        return WorkerRole(args, model, seat)
    raise BugError(f"There is no role {name!r}.")


def live(name: str, role: Role, endpoint: Endpoint, *, stop: Wakeup, heartbeat: Heartbeat) -> None:
    """Report `role` ready, drive it until `stop` is set, then close it and its endpoint."""
    heartbeat.beat(monotonic_ns())
    try:
        endpoint.send(topology.API, Ready(role=name, pid=getpid(), body=role.ready_body()))
        drive(role, endpoint, stop=stop, heartbeat=heartbeat)
    finally:
        role.close()
        endpoint.close()


def drive(role: Role, endpoint: Endpoint, *, stop: Wakeup, heartbeat: Heartbeat) -> None:
    """Run `role` in real time until `stop` is set, beating at every step and at least once per interval."""
    also = (*role.wait_fds, stop.fileno())
    while not stop.is_set:
        now_ns = monotonic_ns()
        heartbeat.beat(now_ns)
        wake_ns = role.step(now_ns)
        idle_ns = min(wake_ns - monotonic_ns(), heartbeat.interval_ns)
        if idle_ns > 0:
            endpoint.wait(idle_ns, also=also)
