"""The parent of all processes of a cluster on this host: starts them, keeps them running, changes roles, ends them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket

import msgspec

from moonlang.base import notify
from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError, PeerError
from moonlang.cluster import plan
from moonlang.cluster.child import Launch
from moonlang.cluster.control import Line, Order, Reply
from moonlang.cluster.directory import write
from moonlang.cluster.membership import Membership
from moonlang.cluster.plan import Host, Invitation, Role
from moonlang.cluster.restarts import Limits
from moonlang.cluster.status import ClusterState, GuestStatus, Status, UnitStatus
from moonlang.cluster.store import Store
from moonlang.cluster.unit import Unit
from moonlang.config.server_args import ServerArgs
from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.roles.run_directory import BASE_VARIABLE

DRAIN_S = 600.0  # how long requests of a server that is to change its role may take
LEAVE_S = 60.0  # the same of servers that leave for good
JOIN_S = 60.0  # from ready until the router has looked at it
STOP_S = 40.0  # a server and a router drain for 30 s by themselves
ORPHANED_S = 60.0  # servers without a router end after so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a cluster, or a host's share in one, is made of.

    roles: of the servers of this host, in order; servers: the flags of each role as the user gave them. router_url: the
    public address; listener: its socket, None when the router is another host's. join: the command for other hosts.
    """

    name: str
    directory: Path
    logs: Path
    router_url: str
    listener: socket | None
    invitation: Invitation
    servers: Mapping[Role, ServerArgs]
    host: Host
    roles: tuple[Role, ...]
    router_flags: tuple[str, ...]
    store: bool
    token: str
    join: str
    parent: int = 0
    limits: Limits = field(default_factory=Limits)

    @property
    def card(self) -> Path:
        """Where the router finds the invitation."""
        return self.directory / "invitation.json"


class Supervisor:
    """last_lines: of the log of the process that it ends for, if one is to blame."""

    def __init__(self, setup: Setup) -> None:
        self.exit_status = 0
        self.reason = ""
        self.last_lines: list[str] = []
        self._setup = setup
        self._invitation = setup.invitation
        self._begun_ns = monotonic_ns()
        self._ready_s: float | None = None
        self._settled = asyncio.Event()  # ready for the first time, or about to end
        self._ending = asyncio.Event()
        self._hurried = asyncio.Event()
        self._ended = False
        self._units: dict[str, Unit] = {}
        self._servers: dict[str, Unit] = {}
        self._held: dict[str, None] = {}  # servers that change their role
        self._store: Store | None = None
        self._switching = asyncio.Lock()
        self._membership = Membership(setup.router_url, setup.token, self._wanted, self._looked)

    async def run(self) -> int:
        """Start everything, stay until the end, leave nothing behind. The exit status."""
        line = Line(self._setup.directory, self._obey)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                loop.add_signal_handler(number, self._signalled)
        await line.open()
        try:
            async with asyncio.TaskGroup() as group:
                beginning = group.create_task(self._begin())
                others = [group.create_task(self._membership.run())]
                if self._setup.parent:
                    others.append(group.create_task(self._end_with(self._setup.parent)))
                await self._ending.wait()
                beginning.cancel()
                await self._end()
                for task in others:
                    task.cancel()
        finally:
            for unit in self._units.values():
                unit.kill()
                unit.close()
            self._ended = True
            line.close()
        return self.exit_status

    def end(self, reason: str, exit_status: int = 0) -> None:
        """Have it end. Only the first reason counts."""
        if not self._ending.is_set():
            self.reason, self.exit_status = reason, exit_status
            self._ending.set()
            self._settled.set()
            notify.stopping()

    def status(self) -> Status:
        """How it is now."""
        setup = self._setup
        ours = self._membership.ours
        others = [one for one in self._membership.listed if one.url not in ours and not one.is_leaving]
        return Status(
            name=setup.name,
            state=self._state(),
            url=setup.router_url,
            seconds=(monotonic_ns() - self._begun_ns) / NS_PER_S,
            ready_seconds=self._ready_s,
            units=[self._shown(unit) for unit in self._units.values()],
            guests=[
                GuestStatus(name=one.name, role=one.worker_type, url=one.url, healthy=one.is_usable, requests=one.load)
                for one in others
            ],
            join=setup.join,
            reason=self.reason,
        )

    # ---- beginning and end

    async def _begin(self) -> None:
        """Start all at once, but the store's master first: servers must know where it is."""
        setup = self._setup
        if setup.listener is not None:
            self._add(plan.ROUTER, plan.ROUTER, self._router_launch)
        try:
            if setup.store:
                self._store = Store(setup.host.address, self._new_unit)
                self._invitation = await self._store.open(self._invitation)
            if setup.listener is not None:
                write(setup.card, msgspec.json.encode(self._invitation))
        except (ConfigError, OSError) as error:
            self.end(str(error), ConfigError.exit_status)
            return
        for number, role in enumerate(setup.roles):
            name = f"server-{number}"
            self._servers[name] = self._add(name, role, lambda unit, n=number: self._server_launch(unit, n))
        if self._store is not None:
            await self._store.attend()

    async def _end(self) -> None:
        """The router first, so that requests can finish; a guest's servers leave the router they are behind."""
        router = self._units.get(plan.ROUTER)
        if router is not None:
            await router.stop(STOP_S)
        else:
            await self._leave()
        await asyncio.gather(*(unit.stop(STOP_S) for unit in self._servers.values()))
        if self._store is not None:
            await self._store.close()

    async def _leave(self) -> None:
        """Until our servers have no requests any more and the router has forgotten them, or a second signal comes."""
        gone = (self._membership.gone(url, LEAVE_S) for url in self._membership.ours)
        leaving = asyncio.gather(*gone, return_exceptions=True)
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait([leaving, hurried], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        hurried.cancel()

    def _signalled(self) -> None:
        """A first signal ends it in order, a second one at once."""
        if self._ending.is_set():
            self._hurried.set()
            for unit in self._units.values():
                unit.kill()
        self.end("It was told to end.")

    async def _end_with(self, parent: int) -> None:
        try:
            handle = os.pidfd_open(parent)
        except ProcessLookupError:
            self.end("Whoever started it is gone.")
            return
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(handle, gone.set)
        try:
            await gone.wait()
            self.end("Whoever started it is gone.")
        finally:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)

    # ---- units

    def _new_unit(self, name: str, role: str, launch: Callable[[Unit], Launch]) -> Unit:
        setup = self._setup
        unit = Unit(
            name,
            role,
            launch,
            setup.directory,
            setup.logs,
            limits=setup.limits,
            changed=self._unit_changed,
            failed=self._unit_failed,
        )
        self._units[name] = unit
        return unit

    def _add(self, name: str, role: str, launch: Callable[[Unit], Launch]) -> Unit:
        unit = self._new_unit(name, role, launch)
        unit.start()
        return unit

    def _router_launch(self, unit: Unit) -> Launch:
        setup, listener = self._setup, self._setup.listener
        assert listener is not None
        flags = plan.router(self._invitation.pairs, setup.servers["regular"], str(setup.card), setup.router_flags)
        return Launch(
            kind="router",
            arguments=(str(listener.fileno()), *flags),
            environment={TOKEN_VARIABLE: setup.token},
            inherited=(listener.fileno(),),
        )

    def _server_launch(self, unit: Unit, number: int) -> Launch:
        setup = self._setup
        role, widest = plan.ROLES[unit.role], max(args.tp_size for args in setup.servers.values())
        return Launch(
            kind="server",
            arguments=plan.server(role, self._invitation, setup.servers[role], setup.host),
            environment={TOKEN_VARIABLE: setup.token, BASE_VARIABLE: str(setup.directory)}
            | plan.environment(number, widest, setup.host, os.environ),
        )

    def _unit_changed(self, unit: Unit) -> None:
        self._membership.hurry()

    def _unit_failed(self, unit: Unit) -> None:
        """One that does not stay up: without a store answers are slower, without anything else there are none."""
        if unit.name == plan.STORE:
            return
        self.last_lines = unit.last_lines
        status = ConfigError.exit_status if unit.status == ConfigError.exit_status else 1
        self.end(f"{unit.name} ({unit.role}) does not stay up; its log is below.", status)

    # ---- membership

    def _wanted(self) -> Mapping[str, tuple[str, str]]:
        guest = self._setup.listener is None
        if guest and self._ending.is_set():
            return {}
        where = f"@{self._setup.host.address}" if guest else ""
        ready = [unit for unit in self._servers.values() if unit.url and unit.name not in self._held]
        return {unit.url: (unit.role, unit.name + where) for unit in ready}

    def _looked(self) -> None:
        if self._ready_s is None and self._state() == "ready":
            self._ready_s = (monotonic_ns() - self._begun_ns) / NS_PER_S
            self._settled.set()
            notify.ready(self._setup.router_url)
        if self._setup.listener is None and self._orphaned():
            why = self._membership.refused or "It does not answer any more."
            self.end(f"The cluster at {self._setup.router_url} is lost. {why}", 1)

    def _orphaned(self) -> bool:
        return monotonic_ns() - self._membership.heard_ns > ORPHANED_S * NS_PER_S

    # ---- orders

    async def _obey(self, order: Order) -> Reply:
        match order.do:
            case "wait":
                await self._settled.wait()
            case "down":
                self.end("It was told to end by `moonlang down`.")
            case "switch":
                await self._switch(order.unit, order.role)
            case "status":
                pass
        return Reply(status=self.status())

    async def _switch(self, name: str, wanted: str) -> None:
        """Give a server another role: the router sends it nothing more, what it has is finished, it starts again."""
        unit, role = self._checked_switch(name, wanted)
        async with self._switching:
            self._refuse_the_last(unit)
            self._held[name] = None
            try:
                await self._membership.gone(unit.url, DRAIN_S)
                await unit.stop(STOP_S)
                if self._ending.is_set():
                    raise PeerError("The cluster ends.")
                unit.role = role
                unit.start()
            finally:
                self._held.pop(name)
            await unit.settled()
            deadline_ns = monotonic_ns() + int(JOIN_S * NS_PER_S)
            while unit.state == "ready" and not self._membership.healthy(unit.url) and monotonic_ns() < deadline_ns:
                await asyncio.sleep(0.05)
        if not self._works(unit):
            raise PeerError(
                f"{name} is no {role} server yet.", hint=f"See `moonlang status` and `moonlang logs {name}`."
            )

    def _checked_switch(self, name: str, wanted: str) -> tuple[Unit, Role]:
        unit = self._servers.get(name)
        if unit is None:
            raise ConfigError(f"There is no server {name} here.", hint=f"There are: {', '.join(self._servers)}.")
        role = plan.ROLES.get(wanted, "regular")
        if role == "regular" or not self._invitation.pairs:
            raise ConfigError(f"{name} cannot become {wanted!r}.", hint="In a cluster of pairs: prefill or decode.")
        if unit.role == role:
            raise ConfigError(f"{name} is a {role} server already.")
        if unit.state != "ready":
            raise ConfigError(f"{name} is not ready ({unit.state}).", hint="Try again when it is.")
        return unit, role

    def _refuse_the_last(self, unit: Unit) -> None:
        if not self._membership.reachable:
            raise PeerError("The router does not answer.", hint="Try again when it does.")
        others = [one for one in self._membership.listed if one.is_usable and one.url != unit.url]
        if not any(one.worker_type == unit.role for one in others):
            raise ConfigError(
                f"{unit.name} is the last {unit.role} server: without it no request could be served.",
                hint="Have another server join first (`moonlang up --join`).",
            )

    # ---- what it says of itself

    def _state(self) -> ClusterState:
        if self._ended:
            return "ended"
        if self._ending.is_set():
            return "stopping"
        whole = len(self._servers) == len(self._setup.roles) and all(map(self._works, self._units.values()))
        return "ready" if whole else "starting" if self._ready_s is None else "degraded"

    def _works(self, unit: Unit) -> bool:
        if unit.name not in self._servers:
            return unit.state == "ready"
        return bool(unit.url) and self._membership.healthy(unit.url)

    def _shown(self, unit: Unit) -> UnitStatus:
        listed = next((one for one in self._membership.listed if unit.url and one.url == unit.url), None)
        state = "joining" if unit.state == "ready" and not self._works(unit) else unit.state
        doing = unit.doing if listed is None or not listed.problem else listed.problem
        return UnitStatus(
            name=unit.name,
            role=unit.role,
            state=state,
            doing=doing,
            share=unit.share,
            pid=unit.pid,
            url=unit.url,
            requests=0 if listed is None else listed.load,
            deaths=unit.deaths,
            seconds=(monotonic_ns() - unit.since_ns) / NS_PER_S,
            log=str(unit.log.path),
        )
