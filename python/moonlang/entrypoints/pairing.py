"""The fields by which a router tells a prefill and a decode server that they are to serve a request together."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Where the prefill half is: its host and bootstrap port, and the room of the pair; lists hold one per prompt."""

    bootstrap_host: str | list[str | None] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None


@dataclass(frozen=True, slots=True)
class Rooms:
    """The meeting places of one call, one per prompt. counted: the call named one room, and the next ones follow it."""

    places: tuple[PeerSpec, ...]
    counted: bool

    def peer(self, prompt: int, sample: int, sequence: int) -> PeerSpec | None:
        """Where sequence `sequence` of the call, the `sample`-th of `prompt`, meets its other half, if at all."""
        place = self.places[prompt]
        if place.host == ALONE:
            return None
        return PeerSpec(place.host, place.port, (place.room + (sequence if self.counted else sample)) % ROOMS)


def rooms(args: ServerArgs, fields: PairFields, count: int) -> Rooms | None:
    """The rooms of a call of `count` prompts; None on a server that works alone. RequestError 400 without them.

    A port that is left out is this server's own: instances started with the same flags use the same one.
    """
    if args.disaggregation_mode == "null":
        return None
    if fields.bootstrap_room is None:
        raise RequestError(
            "Disaggregated request received without bootstrap room id.",
            hint=f"This is a {args.disaggregation_mode} server: send requests to its router.",
        )
    hosts = _each("bootstrap_host", fields.bootstrap_host, count)
    ports = _each("bootstrap_port", fields.bootstrap_port, count)
    numbers = _each("bootstrap_room", fields.bootstrap_room, count)
    places = tuple(_place(args, *one) for one in zip(hosts, ports, numbers, strict=True))
    return Rooms(places, not isinstance(fields.bootstrap_room, list))


def _each(name: str, value: T | list[T], count: int) -> list[T]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} must be one value or a list of {count} values, one per prompt, got {len(value)}.")
    return value


def _place(args: ServerArgs, host: str | None, port: int | None, room: int | None) -> PeerSpec:
    if room is None or not 0 <= room < ROOMS:
        raise RequestError(f"bootstrap_room must be an integer in [0, 2^63), got {shown(room)}.")
    if port is not None and not 0 < port < 1 << 16:
        raise RequestError(f"bootstrap_port must be in [1, 65535], got {shown(port)}.")
    if not host and args.disaggregation_mode == "decode":
        raise RequestError("bootstrap_host must name the host of the prefill server.")
    return PeerSpec(host or "", args.disaggregation_bootstrap_port if port is None else port, room)
