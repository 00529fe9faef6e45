"""The store of a cluster: one master of Mooncake's, whose memory the servers give."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError
from moonlang.cluster import plan
from moonlang.cluster.child import Launch
from moonlang.cluster.plan import Invitation
from moonlang.cluster.unit import Unit
from moonlang.mooncake import cluster as services

ATTEMPTS = 8  # with other ports each
START_S = 30.0
LOOK_S = 0.02
STOP_S = 5.0

NewUnit = Callable[[str, str, Callable[[Unit], Launch]], Unit]


class Store:
    """address: numeric, where the master is to listen."""

    def __init__(self, address: str, new_unit: NewUnit) -> None:
        self._address = address
        self._new_unit = new_unit
        self._program = services.master_program()
        self._unit: Unit | None = None
        self._port = 0

    async def open(self, invitation: Invitation) -> Invitation:
        """Start the master; the invitation, with its address. The master cannot listen on a port that the kernel
        chooses: one that is free now may be taken when it starts, and then another is tried. ConfigError in the end."""
        for _ in range(ATTEMPTS):
            unit = self._unit = self._started()
            if await self._listens(unit):
                unit.is_ready(self._shown)
                return msgspec.structs.replace(invitation, master=self._shown)
            await unit.stop(0)
            unit.close()
        lines = "\n".join(self._unit.last_lines[-5:]) if self._unit is not None else ""
        raise ConfigError(f"The master of the store does not start.\n{lines}", hint="Leave out --store.")

    async def attend(self) -> None:
        """See when it is up again after it has died; until cancelled."""
        unit = self._unit
        assert unit is not None
        while True:
            await asyncio.sleep(LOOK_S * 10)
            if unit.state == "starting" and services.listens(unit.pid, self._port):
                unit.is_ready(self._shown)

    async def close(self) -> None:
        if self._unit is not None:
            await self._unit.stop(STOP_S)

    @property
    def _shown(self) -> str:
        return f"[{self._address}]:{self._port}" if ":" in self._address else f"{self._address}:{self._port}"

    def _started(self) -> Unit:
        self._port, metrics = services.free_ports(self._address, 2)
        command = services.master_command(self._program, self._address, self._port, metrics)
        unit = self._new_unit(plan.STORE, "master", lambda unit: Launch(kind="program", arguments=command))
        unit.start()
        return unit

    async def _listens(self, unit: Unit) -> bool:
        deadline_ns = monotonic_ns() + int(START_S * NS_PER_S)
        while unit.state == "starting" and monotonic_ns() < deadline_ns:
            if services.listens(unit.pid, self._port):
                return True
            await asyncio.sleep(LOOK_S)
        return False
