"""What the processes of a cluster are started with. Pure: arguments in, command lines and environments out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from moonlang.config.server_args import ServerArgs

Role = Literal["regular", "prefill", "decode"]
ROLES: dict[str, Role] = {"regular": "regular", "prefill": "prefill", "decode": "decode"}
PAIRED: tuple[Role, ...] = ("prefill", "decode")
STORE = "store"
ROUTER = "router"
CPU_SHARE = 0.5  # of free memory, for weights and KV pools of all servers of a host
HOST_POOL_SHARE = 0.8


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """What a host must know to bring servers into a cluster; the router shows it to whoever has the token.

    flags: of every server; role_flags: more for those of a role. master: address of the store's master, "" without a
    store; store_size: memory that each server gives to it, like "1gb".
    """

    version: str
    name: str
    pairs: bool
    flags: tuple[str, ...]
    role_flags: dict[str, tuple[str, ...]] = {}
    master: str
    store_size: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where servers run. address: what they listen on; count: how many there are of them; gpus: that may be used."""

    address: str
    count: int
    gpus: tuple[str, ...] = ()
    transfer_backend: str | None = None


def server(role: Role, invitation: Invitation, args: ServerArgs, host: Host) -> tuple[str, ...]:
    """The flags of one server; `args` are those that the user gave."""
    given = (*invitation.flags, *invitation.role_flags.get(role, ()))
    said = {flag.partition("=")[0] for flag in given}
    flags = [*given, "--host", host.address, "--port", "0"]
    if "--log-level-http" not in said and "--log-level" not in said:
        flags += ["--log-level-http", "warning"]
    if role != "regular":
        flags += ["--disaggregation-mode", role]
        if role == "prefill":
            flags += ["--disaggregation-bootstrap-port", "0"]
        if host.transfer_backend is not None and "--disaggregation-transfer-backend" not in said:
            flags += ["--disaggregation-transfer-backend", host.transfer_backend]
    if args.mem_fraction_static is None and host.count > 1 and not host.gpus:
        flags += ["--mem-fraction-static", f"{CPU_SHARE / host.count:.3f}"]
    if invitation.master:
        flags += _store(role, invitation, host)
    return tuple(flags)


def _store(role: Role, invitation: Invitation, host: Host) -> list[str]:
    settings = {
        "master_server_address": invitation.master,
        "metadata_server": "P2PHANDSHAKE",
        "local_hostname": host.address,
        "global_segment_size": invitation.store_size,
    }
    flags = ["--enable-hierarchical-cache", "--hicache-storage-backend", "mooncake"]
    flags += ["--hicache-storage-backend-extra-config", json.dumps(settings)]
    if host.count > 1:
        flags += ["--hicache-host-memory-fraction", f"{HOST_POOL_SHARE / host.count:.3f}"]
    return flags if role != "decode" else [*flags, "--disaggregation-decode-enable-offload-kvcache"]


def router(pairs: bool, args: ServerArgs, card: str, flags: Sequence[str]) -> tuple[str, ...]:
    """The flags of the router; `args` are the servers'. `flags` come last: the user's win."""
    found = ["--cluster-card", card, "--shutdown-grace-period-secs", "30"]
    if pairs:
        found.append("--pd-disaggregation")
    if args.api_key is not None:
        found += ["--api-key", args.api_key]
    return (*found, *flags)


def environment(number: int, tp_size: int, host: Host, present: Mapping[str, str]) -> dict[str, str]:
    """What server `number` of a host gets on top of our own environment, `present`. tp_size: most of any role."""
    found = {}
    if host.count > 1 and "MOONLANG_CPU_PIN" not in present:
        found["MOONLANG_CPU_PIN"] = "0"  # they share the cores: none may sit on one
    if host.gpus:
        first = number * tp_size
        found["CUDA_VISIBLE_DEVICES"] = ",".join(host.gpus[(first + k) % len(host.gpus)] for k in range(tp_size))
    return found
