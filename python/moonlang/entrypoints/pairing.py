"""The fields by which a router says where a request is to be served: in which pair of servers, by which replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from moonlang.base.errors import RequestError
from moonlang.config.server_args import ServerArgs
from moonlang.core.pairing import PeerSpec
from moonlang.core.sampling_parse import shown

T = TypeVar("T")

ROOMS = 1 << 63  # rooms are numbers in [0, ROOMS)
ALONE = "2.2.2.2"  # a host that nobody dials: probes and warm-ups send it to servers that are to answer by themselves


class PairFields(msgspec.Struct, kw_only=True):
    """Where the prefill half is: its host and bootstrap port, and the room of the pair.

    Each is one value, or a list with one value per prompt or per sequence. routed_dp_rank: the replica that is to serve
    the call; data_parallel_rank is its older name. disagg_prefill_dp_rank: the same for the prefill server of a pair.
    """

    bootstrap_host: str | list[str | None] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    disagg_prefill_dp_rank: int | None = None


class Rooms:
    """The meeting places of one call.

    A port that is left out is this server's own: servers with the same flags have the same one. One room for several
    sequences is the first of as many in a row, and so is a prompt's for its samples.
    """

    def __init__(self, args: ServerArgs, fields: PairFields) -> None:
        self._args = args
        self._fields = fields

    def peers(self, samples: Sequence[int]) -> list[PeerSpec | None]:
        """Where each sequence meets its other half; None: it has none. samples: the number of sequences per prompt.

        RequestError 400 when places are missing or make no sense.
        """
        hosts = _each("bootstrap_host", self._fields.bootstrap_host, samples)
        ports = _each("bootstrap_port", self._fields.bootstrap_port, samples)
        rooms = _each("bootstrap_room", self._fields.bootstrap_room, samples)
        found = [self._place(*place) for place in zip(hosts, ports, rooms, _steps(self._fields, samples), strict=True)]
        taken = [peer.room for peer in found if peer is not None]
        if len(set(taken)) < len(taken):
            raise RequestError("bootstrap_room must not name the same room for two sequences.")
        return found

    def _place(self, host: str | None, port: int | None, room: int | None, step: int) -> PeerSpec | None:
        if room is None or not 0 <= room < ROOMS:
            raise RequestError(f"bootstrap_room must be an integer in [0, 2^63), got {shown(room)}.")
        if port is not None and not 0 < port < 1 << 16:
            raise RequestError(f"bootstrap_port must be in [1, 65535], got {shown(port)}.")
        if not host and self._args.disaggregation_mode == "decode":
            raise RequestError("bootstrap_host must name the host of the prefill server.")
        if host == ALONE:
            return None
        port = self._args.disaggregation_bootstrap_port if port is None else port
        return PeerSpec(host or "", port, (room + step) % ROOMS)


def rooms(args: ServerArgs, fields: PairFields) -> Rooms | None:
    """The rooms of a call; None on a server that works alone. RequestError 400 when there are none."""
    if args.disaggregation_mode == "null":
        return None
    if fields.bootstrap_room is None:
        raise RequestError(
            "Disaggregated request received without bootstrap room id.",
            hint=f"This is a {args.disaggregation_mode} server: send requests to its router.",
        )
    return Rooms(args, fields)


def dp_rank(args: ServerArgs, fields: PairFields) -> int | None:
    """The replica that is to serve a call; None: any. A decode server finds its peer without being told the replica."""
    if args.disaggregation_mode == "prefill" and fields.disagg_prefill_dp_rank is not None:
        return fields.disagg_prefill_dp_rank
    return fields.data_parallel_rank if fields.routed_dp_rank is None else fields.routed_dp_rank


def _each(name: str, value: T | list[T] | list[T | None] | None, samples: Sequence[int]) -> list[T | None]:
    """A field as one value per sequence."""
    total = sum(samples)
    if not isinstance(value, list):
        return [value] * total
    if len(value) == len(samples):
        return [one for one, count in zip(value, samples, strict=True) for _ in range(count)]
    if len(value) == total:
        return list(value)
    raise RequestError(
        f"{name} must be one value, a list of {len(samples)} values, one per prompt, or of {total}, one per sequence; "
        f"got {len(value)}."
    )


def _steps(fields: PairFields, samples: Sequence[int]) -> list[int]:
    """How far the room of each sequence is from the one that the call names for it."""
    if not isinstance(fields.bootstrap_room, list):
        return list(range(sum(samples)))
    if len(fields.bootstrap_room) == len(samples):
        return [sample for count in samples for sample in range(count)]
    return [0] * sum(samples)
