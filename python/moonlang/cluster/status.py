"""How a cluster is, as its supervisor tells its view and other commands."""

from __future__ import annotations

from typing import Literal

import msgspec

ClusterState = Literal["starting", "ready", "degraded", "stopping", "ended"]


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process. state: as in `Unit`, or "joining" until the router gives requests to it; doing, share: of its start.

    url: "" while it answers nowhere; requests: under way; seconds: in this state. pid: 0 for none.
    """

    name: str
    role: str
    state: str
    doing: str
    share: float | None
    pid: int
    url: str
    requests: int
    deaths: int
    seconds: float
    log: str


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A server that another host has brought."""

    name: str
    role: str
    url: str
    healthy: bool
    requests: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """seconds: since the start; ready_seconds: how long that took, None before its end. join: what another host is to
    run, "" when none reaches this one. reason: why it ends."""

    name: str
    state: ClusterState
    url: str
    seconds: float
    ready_seconds: float | None
    units: list[UnitStatus]
    guests: list[GuestStatus]
    join: str
    reason: str
