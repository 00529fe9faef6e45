"""Starts the roles of a server, waits until they are ready, reports the first that dies, stops them all."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from signal import SIGKILL
from typing import Any, Protocol

import msgspec

from moonlang.base import log
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.config import kv_events
from moonlang.config.experts import is_elastic
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Ready
from moonlang.core.ports import Endpoint
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.roles import topology
from moonlang.roles.children import ProcessGroup
from moonlang.roles.exits import Exit, OnExit, describe
from moonlang.roles.heartbeat import Heartbeat
from moonlang.roles.load_board import LoadBoard, open_board
from moonlang.roles.mailboxes import cluster_token, open_mailbox
from moonlang.roles.process import Job, heartbeat_file, job_file
from moonlang.roles.run_directory import RunDirectory
from moonlang.roles.seats import seats
from moonlang.roles.threads import ThreadGroup
from moonlang.roles.watchdog import Watchdog

START_TIMEOUT_S = 3600.0  # fetching a large model takes its time; a role that dies is noticed at once anyway
STOP_TIMEOUT_S = 5.0

_log = log.get(__name__)


class Group(Protocol):
    """Running roles, as processes or threads."""

    def stop(self, timeout_s: float) -> None: ...


class Cluster:
    """A running server's roles as its owner, the API process, sees them.

    endpoint: the mailbox "api". ready: what each role reported of itself, by role name; filled by `wait_ready`.
    """

    def __init__(self, args: ServerArgs, model: ModelConfig) -> None:
        self.ready: dict[str, Any] = {}
        self._args = args
        self._closing = False
        self._died = Wakeup()
        self._lock = threading.Lock()
        self._first_exit: Exit | None = None
        self._callback: OnExit | None = None
        self._lost: list[str] = []
        self._on_loss: Callable[[str], None] | None = None
        self._directory: RunDirectory | None = None
        self._hub: Hub | None = None
        self._watchdog: Watchdog | None = None
        self._heartbeats: dict[str, Heartbeat] = {}
        self.endpoint: Endpoint
        self._group: Group
        try:
            if args.in_process:
                self._start_threads(model)
            else:
                self._start_processes(model)
        except BaseException:  # also Ctrl-C; roles that run already end with this process
            if self._directory is not None:
                self._directory.remove()
            raise

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Block until every role is up. When one cannot start: its own ConfigError, or PeerError; all are closed."""
        deadline_ns = monotonic_ns() + int(timeout_s * NS_PER_S)
        try:
            while missing := self._heartbeats.keys() - self.ready.keys():
                if self._first_exit is not None:
                    raise self._first_exit.as_error()
                left_ns = deadline_ns - monotonic_ns()
                if left_ns <= 0:
                    names = ", ".join(sorted(missing))
                    raise PeerError(f"Not ready after {timeout_s:.0f} s: {names}.")
                self.endpoint.wait(left_ns, also=(self._died.fileno(),))
                for envelope in self.endpoint.recv():
                    if isinstance(envelope.body, Ready):
                        self.ready[envelope.body.role] = {"pid": envelope.body.pid} | envelope.body.body
        except BaseException:  # also Ctrl-C: nothing may be left running
            self.close()
            raise
        self._watchdog = Watchdog(self._heartbeats, self._hung)

    def on_death(self, callback: Callable[[str, int, tuple[str, ...]], None]) -> None:
        """Have `callback(role, exit status, last lines)` called once, when the first role dies or hangs.

        It runs on another thread; at once when a role is dead already. The status is negative for a signal.
        """

        def report(end: Exit) -> None:
            callback(end.name, end.status, end.lines)

        with self._lock:
            self._callback = report
            end = self._first_exit
        if end is not None:
            report(end)

    def on_loss(self, callback: Callable[[str], None]) -> None:
        """Have `callback(role)` called for each role without which the server goes on, on another thread; at once for
        those that are lost already."""
        with self._lock:
            self._on_loss = callback
            lost = list(self._lost)
        for role in lost:
            callback(role)

    def wait_end(self) -> None:
        """Block until a role dies."""
        while self._first_exit is None:
            self.endpoint.wait(NS_PER_S, also=(self._died.fileno(),))

    def close(self) -> None:
        """Stop every role and remove what they have left. May be called twice."""
        if self._closing:
            return
        self._closing = True
        if self._watchdog is not None:
            self._watchdog.close()
        self._group.stop(STOP_TIMEOUT_S)
        self.endpoint.close()
        if self._hub is not None:
            self._hub.close()
        for heartbeat in self._heartbeats.values():
            heartbeat.close()
        if self._directory is not None:
            self._directory.remove()

    def load_board(self) -> LoadBoard | None:
        """Where the fronts of this server say what they have sent to replicas; None when there is nothing to say."""
        return None if self._directory is None else open_board(self._directory.path, self._args, 0)

    def _start_processes(self, model: ModelConfig) -> None:
        self._directory = RunDirectory()
        directory = self._directory.path
        roles = topology.children(self._args)
        addresses = topology.addresses(directory, roles)
        found = seats(directory, self._args)
        token = cluster_token()
        self.endpoint = open_mailbox(self._args.messaging_backend, topology.API, addresses, token)
        for role in roles:
            self._heartbeats[role] = Heartbeat(heartbeat_file(directory, role), self._args.watchdog_timeout)
            job = Job(
                role=role,
                parent_pid=os.getpid(),
                addresses=addresses,
                token=token,
                args=_own(self._args, role),
                model=model,
                seat=found.get(topology.rank(role, self._args)),
            )
            job_file(directory, role).write_bytes(msgspec.json.encode(job))
        self._group = ProcessGroup(roles, directory, self._exited)

    def _start_threads(self, model: ModelConfig) -> None:
        self._hub = Hub(topology.ROLES)
        self.endpoint = InprocEndpoint(topology.API, self._hub)
        self._heartbeats = {name: Heartbeat(None, self._args.watchdog_timeout) for name in topology.CHILDREN}
        self._group = ThreadGroup(self._heartbeats, self._args, model, self._hub, self._exited)

    def _hung(self, name: str) -> None:
        if self._first_exit is not None:  # all end already
            return
        _log.error("The %s has not answered for %g s (--watchdog-timeout).", name, self._args.watchdog_timeout)
        if self._args.in_process:  # a thread cannot be killed
            self._exited(Exit(name=name, status=1))
        else:
            os.kill(self.ready[name]["pid"], SIGKILL)

    def _exited(self, end: Exit) -> None:
        """Keep and report the first end; the others usually follow from it."""
        if self._can_spare(end.name):
            return
        with self._lock:
            if self._closing or self._first_exit is not None:
                return
            self._first_exit = end
            callback = self._callback
        if self.ready.keys() == self._heartbeats.keys():
            _log.error("The %s %s.", end.name, describe(end.status))
        self._died.set()
        if callback is not None:
            callback(end)

    def _can_spare(self, name: str) -> bool:
        """Whether the others go on without a role that has ended: once all are ready, a rank of an elastic server that
        does not plan for the last of its replicas."""
        if not is_elastic(self._args) or self._watchdog is None or topology.rank(name, self._args) is None:
            return False
        if self._closing:
            return True
        with self._lock:
            if not set(topology.schedulers(self._args)) - {name, *self._lost}:
                return False
            self._lost.append(name)
            callback = self._on_loss
        self._watchdog.forget(name)
        _log.error("The %s has ended; the server goes on without it.", name)
        if callback is not None:
            callback(name)
        return True


def _own(args: ServerArgs, role: str) -> ServerArgs:
    """The arguments with the first GPU, and the ports, of the replica to which a role belongs."""
    replica = topology.replica(role, args)
    before = replica * topology.replica_size(args)
    return dataclasses.replace(
        args,
        base_gpu_id=args.base_gpu_id + before * args.gpu_id_step,
        kv_events_config=kv_events.of_replica(args.kv_events_config, replica),
    )


def launch(args: ServerArgs, model: ModelConfig) -> Cluster:
    """Start all roles and wait until they are ready. ConfigError or PeerError when one cannot start."""
    cluster = Cluster(args, model)
    cluster.wait_ready()
    return cluster
