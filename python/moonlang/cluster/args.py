"""The flags of `moonlang up`: its own, `--router-...` for the router, all others for every server."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from moonlang.base.errors import ConfigError
from moonlang.base.units import parse_bytes
from moonlang.cluster.directory import checked_name
from moonlang.cluster.plan import PAIRED, Role
from moonlang.config import server_args
from moonlang.config.server_args import ServerArgs
from moonlang.disaggregation.connection import Address
from moonlang.disaggregation.frames import TOKEN_VARIABLE

MOST_SERVERS = 64  # of one host
_ROUTER = "--router-"
# Flags of servers that `up` sets by itself, or that do not go with many servers behind one router.
_OURS = (
    *("disaggregation_mode", "disaggregation_bootstrap_port", "nnodes", "node_rank", "dist_init_addr"),
    *("ssl_keyfile", "ssl_certfile"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpArgs:
    """port, name: None for a free one. join: public address of a cluster to bring servers to. parent: process id that
    it must not outlive, 0: none. role_flags: what only servers of one role get, on top of server_flags.
    """

    name: str | None
    host: str | None
    port: int | None
    prefill: int
    decode: int
    replicas: int
    store: str
    join: Address | None
    token: str
    log_dir: Path | None
    plain: bool
    parent: int
    server_flags: tuple[str, ...]
    role_flags: dict[str, tuple[str, ...]]
    router_flags: tuple[str, ...]

    @property
    def pairs(self) -> bool:
        return bool(self.prefill or self.decode)

    @property
    def count(self) -> int:
        """Servers on this host."""
        return self.prefill + self.decode + self.replicas


def parse(argv: Sequence[str]) -> UpArgs:
    """Read a command line. Prints help and exits on --help; ConfigError on bad input."""
    given, rest = _parser().parse_known_args(argv)
    router_flags, server_flags = _sorted(rest)
    if given.join is not None:
        _refuse_for_guests(given, server_flags, router_flags)
    if given.store is not None:
        parse_bytes(given.store, "--store")
    role_flags = {role: _split(role, text) for role, text in _for_roles(given) if text is not None}
    servers = server_args.parse(server_flags)
    _refuse_ours(servers)
    for role, args in understood(server_flags, role_flags).items():
        _refuse_ours(args, role)
    prefill, decode, replicas = _counts(given)
    return UpArgs(
        name=None if given.name is None else checked_name(given.name),
        host=given.host,
        port=given.port,
        prefill=prefill,
        decode=decode,
        replicas=replicas,
        store=given.store or "",
        join=None if given.join is None else _address(given.join),
        token=_token(given),
        log_dir=given.log_dir,
        plain=given.plain,
        parent=given.parent,
        server_flags=_anchored(server_flags, servers),
        role_flags=role_flags,
        router_flags=router_flags,
    )


def understood(flags: Sequence[str], role_flags: Mapping[str, Sequence[str]]) -> dict[Role, ServerArgs]:
    """What the servers of each role make of the flags that the user gave. ConfigError when that is nothing."""
    found: dict[Role, ServerArgs] = {"regular": server_args.parse(flags)}
    for role in PAIRED:
        mode = ("--disaggregation-mode", role) if role in role_flags else ()
        found[role] = server_args.parse((*flags, *role_flags.get(role, ()), *mode))
    return found


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".", hint="`moonlang up --help` shows the flags.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="moonlang up",
        description="Start a cluster: a router, servers behind it, and their shared store, in one terminal.",
        epilog="All other flags are those of `moonlang serve` and go to every server; --router-FLAG to the router.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prefill", type=int, default=None, metavar="N", help="prefill servers (1 with --decode)")
    add("--decode", type=int, default=None, metavar="N", help="decode servers (1 with --prefill)")
    add("--replicas", type=int, default=None, metavar="N", help="servers that work alone (1 without the other two)")
    add("--store", nargs="?", const="1gb", metavar="SIZE", help="a shared KV store; each server gives SIZE to it (1gb)")
    add("--for-prefill", metavar="FLAGS", help='flags of prefill servers only: --for-prefill="--tp-size 2"')
    add("--for-decode", metavar="FLAGS", help="flags of decode servers only")
    add("--name", metavar="NAME", help="of the cluster, for the other commands (moonlang, or the next free one)")
    add("--host", metavar="ADDRESS", help="where to listen; other hosts must reach it to join (127.0.0.1)")
    add("--port", type=int, metavar="N", help="the public port (30000, or the next free one)")
    add("--join", metavar="HOST:PORT", help="bring servers of this host to a cluster that runs there")
    add("--token", metavar="TOKEN", help=f"secret of the cluster (drawn; or {TOKEN_VARIABLE})")
    add("--log-dir", type=Path, metavar="FOLDER", help="keep the logs there (they go with the cluster)")
    add("--plain", action="store_true", help="lines instead of a live view, also in a terminal")
    add("--parent", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _sorted(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those for the router and those for servers; a value belongs to the flag before it."""
    router: list[str] = []
    server: list[str] = []
    target = server
    for word in words:
        if word.startswith("--"):
            target = router if word.startswith(_ROUTER) else server
        target.append("--" + word.removeprefix(_ROUTER) if word.startswith(_ROUTER) else word)
    return tuple(router), tuple(server)


def _for_roles(given: argparse.Namespace) -> tuple[tuple[str, str | None], ...]:
    return ("prefill", given.for_prefill), ("decode", given.for_decode)


def _split(role: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--for-{role} {text} cannot be taken apart: {error}.") from None


def _counts(given: argparse.Namespace) -> tuple[int, int, int]:
    """prefill, decode and replicas."""
    pairs = given.prefill is not None or given.decode is not None
    if pairs and given.replicas:
        raise ConfigError(
            "--replicas are servers that work alone; --prefill and --decode make pairs.", hint="Start two clusters."
        )
    counts = (given.prefill, given.decode, given.replicas)
    if any(count is not None and not 0 <= count <= MOST_SERVERS for count in counts):
        raise ConfigError(f"--prefill, --decode and --replicas must be in [0, {MOST_SERVERS}].")
    if not pairs:
        return 0, 0, 1 if given.replicas is None else given.replicas
    default = 0 if given.join is not None else 1
    prefill, decode = (default if count is None else count for count in (given.prefill, given.decode))
    if given.join is None and not (prefill and decode):
        raise ConfigError("A cluster of pairs needs a prefill and a decode server.", hint="Leave out the 0.")
    return prefill, decode, 0


def _refuse_for_guests(given: argparse.Namespace, server_flags: tuple[str, ...], router_flags: tuple[str, ...]) -> None:
    own = (
        ("--port", given.port),
        ("--store", given.store),
        *((f"--for-{role}", text) for role, text in _for_roles(given)),
    )
    theirs = [flag for flag, value in own if value is not None]
    theirs += [flag for flag in (*server_flags, *router_flags) if flag.startswith("--")]
    theirs = [flag for flag in theirs if flag.partition("=")[0] != "--model-path"]
    if theirs:
        raise ConfigError(
            f"{theirs[0]} does not go with --join: servers that join get the flags of the cluster.",
            hint="Only --model-path may differ, where the model is in another place.",
        )
    if not (given.token or os.environ.get(TOKEN_VARIABLE)):
        raise ConfigError("--join needs --token.", hint="`moonlang status` shows it on the host of the cluster.")


def _refuse_ours(servers: ServerArgs, role: str = "null") -> None:
    """role: the mode that we have put in."""
    for field in fields(servers):
        value = getattr(servers, field.name)
        if field.name in _OURS and value not in (field.default, role):
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(
                f"{flag} does not go with `moonlang up`.", hint="Start such servers with `moonlang serve`."
            )


def _anchored(flags: tuple[str, ...], servers: ServerArgs) -> tuple[str, ...]:
    """A model's folder by its whole path: servers on other hosts start elsewhere."""
    path = servers.model_path
    if path is None or not Path(path).expanduser().is_dir():
        return flags
    whole = str(Path(path).expanduser().absolute())
    return tuple(
        whole if flag == path else f"--model-path={whole}" if flag == f"--model-path={path}" else flag for flag in flags
    )


def _token(given: argparse.Namespace) -> str:
    token = given.token or os.environ.get(TOKEN_VARIABLE, "")
    if not token.isascii() or any(letter.isspace() for letter in token):
        raise ConfigError("A token is made of ASCII characters without spaces.")
    return token


def _address(text: str) -> Address:
    host, colon, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--join {text} is no address.", hint="Write it like --join 10.0.0.1:30000.")
    return host.strip("[]"), int(port)
