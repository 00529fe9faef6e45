"""The exchange of tokens between the ranks that hold experts: --moe-a2a-backend mooncake.

Ranks of one host write into a segment that all have mapped, a message straight into the box of its receiver, and say so
by a number that is written last. Between hosts a message is one write of the transfer engine into the receiver's
registered memory, and a second, small one behind it that says so; see `exchange_remote`.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import torch
from sgl_kernel.exchange import SharedMailboxes

from moonlang.base import log
from moonlang.base.errors import ConfigError, PeerError
from moonlang.config.resolve import split_address
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.moe.exchange.mailboxes import MailboxExchange
from moonlang.moe.exchange.port import ExchangeSpec, check_ways
from moonlang.mooncake import config, lib, probe
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.exchange_remote import open_between_hosts

_log = log.get(__name__)

_SEGMENTS = Path("/dev/shm")
_SPIN_US = 50
_ROLL = "-exchange-"  # behind the path where the ranks meet: files in which they wait for each other


class Segment:
    """Zeroed memory that all ranks of one host have mapped; it goes with the last of them, also after SIGKILL."""

    def __init__(self, name: str, size: int, group: Group) -> None:
        """PeerError when the ranks do not agree about it."""
        kind = lib.shared_segment()
        before = _segment_files()
        try:
            self._segment, card = kind.create(name, size, group.size, group.rank, 0, 0, True, False)
        except RuntimeError as error:
            text = f"Mooncake cannot make {size >> 20} MB of shared memory: {error}."
            raise ConfigError(text, hint="Look at the size of /dev/shm.") from error
        made = _segment_files() - before
        cards = group.all_gather(torch.frombuffer(bytearray(card), dtype=torch.uint8))
        try:
            self._segment.complete([bytes(one.numpy()) for one in cards])
        except RuntimeError as error:
            raise PeerError(f"The ranks of this host cannot share memory: {error}.") from error
        self.address: int = self._segment.base_addr()
        self.size: int = self._segment.size()
        group.barrier()  # all have mapped it: nobody will look for it by its name, which would stay after a crash
        for path in made if group.rank == 0 else ():
            path.unlink(missing_ok=True)


def _segment_files() -> set[Path]:
    """Of this process."""
    return set(_SEGMENTS.glob(f"mcss_{os.getpid()}_*"))


def open_exchange(spec: ExchangeSpec, seat: Seat, group: Group) -> MailboxExchange:
    """See moe.exchange.port.Open."""
    check(spec)
    if seat.within_host:
        opened = _within_host(spec, seat, group)
    else:
        engine = Engine(_config(spec, _host_towards(seat.meeting)))
        opened = open_between_hosts(spec, seat, group, engine)
        _log.info("Tokens travel to their experts by Mooncake's transfer engine.")
    check_ways(opened, spec, group)
    return opened


def check(spec: ExchangeSpec) -> None:
    """ConfigError when Mooncake cannot carry tokens here: it is not installed, or there is no such network card."""
    lib.shared_segment()
    _config(spec, "127.0.0.1")


def _host_towards(meeting: str) -> str:
    """Where the others, who come from all over to `meeting`, reach this node."""
    host, _ = split_address(meeting.removeprefix("tcp://"))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host.strip("[]"), 9))  # sends nothing: it only looks up the way
        return way.getsockname()[0]


def _config(spec: ExchangeSpec, host: str) -> config.MooncakeConfig:
    """A machine without RDMA cards uses TCP, whatever card is named: the same command serves everywhere."""
    found = probe.hardware()
    bare = bool(spec.devices) and not found.infiniband and "MOONCAKE_PROTOCOL" not in os.environ
    if bare:
        _log.warning("There is no RDMA card %s here: TCP carries what leaves this host.", spec.devices)
    return config.read(os.environ, found, host=host, ib_device=spec.devices, force_tcp=bare)


def _base(seat: Seat, group: Group) -> str:
    """The beginning of paths that are theirs alone: where they meet, or, when others come there from other hosts (these
    are a stage), one that is drawn."""
    if not seat.meeting.startswith("tcp://"):
        return seat.path
    (drawn,) = group.broadcast(torch.tensor([secrets.randbits(62)])).tolist()
    return str(_SEGMENTS / f"moonlang-run-{drawn:x}-{seat.part}")


def _within_host(spec: ExchangeSpec, seat: Seat, group: Group) -> MailboxExchange:
    base = _base(seat, group)
    each = SharedMailboxes.memory_bytes(seat.size, spec.box_bytes)
    segment = Segment(f"{Path(base).name}|experts", each * spec.lanes, group)
    spin_us = _SPIN_US if len(os.sched_getaffinity(0)) >= seat.local_size else 0
    paths = [Path(f"{base}{_ROLL}{lane}") for lane in range(spec.lanes)]
    boxes = [
        SharedMailboxes(
            str(path),
            segment.address + lane * each,
            each,
            seat.rank,
            seat.size,
            box_bytes=spec.box_bytes,
            patience_ms=int(seat.patience_s * 1000),
            spin_us=spin_us,
            owner=segment,
        )
        for lane, path in enumerate(paths)
    ]
    group.barrier()
    for path in paths if seat.rank == 0 else ():
        path.unlink(missing_ok=True)
    _log.info("Tokens travel to their experts through shared memory (%d MB).", segment.size >> 20)
    return MailboxExchange(spec, boxes)
