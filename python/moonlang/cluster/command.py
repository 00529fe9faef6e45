"""The command `moonlang up`: start a cluster, or bring servers to one, and stay until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from moonlang.base import log
from moonlang.base.errors import ConfigError
from moonlang.cluster import args as flags
from moonlang.cluster import directory, invite, network
from moonlang.cluster.args import UpArgs
from moonlang.cluster.directory import Card
from moonlang.cluster.plan import Host, Invitation, Role
from moonlang.cluster.supervisor import Setup, Supervisor
from moonlang.config import alias, host
from moonlang.config.server_args import ServerArgs
from moonlang.disaggregation.connection import Address
from moonlang.mooncake import lib
from moonlang.version import __version__

FRAME_S = 0.2  # between two pictures
_TOKEN_BYTES = 24
_LOCAL = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the cluster; 2 with a text on stderr when the configuration is wrong."""
    log.configure("up", "warning")
    try:
        alias.check()
        args = flags.parse(sys.argv[1:] if argv is None else argv)
        with ExitStack() as stack:
            setup = _cluster(args, stack) if args.join is None else _guest(args, args.join, stack)
            card = Card(name=setup.name, pid=os.getpid(), url=setup.router_url, logs=str(setup.logs))
            directory.publish(setup.directory, card)
            return asyncio.run(_live(setup, plain=args.plain))
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status


def _cluster(args: UpArgs, stack: ExitStack) -> Setup:
    """A whole cluster. stack: ends what it has taken."""
    public = args.host or _LOCAL
    address = network.own_address(public)
    listener = stack.enter_context(network.public_socket(public, args.port))
    name, folder = directory.claim(args.name)
    stack.callback(folder.remove)
    where = _written((address, listener.getsockname()[1]))
    token = args.token or secrets.token_hex(_TOKEN_BYTES)  # others give it on a command line: it begins with no "-"
    understood = flags.understood(args.server_flags, args.role_flags)
    servers = "--decode 1" if args.pairs else "--replicas 1"
    return Setup(
        name=name,
        directory=folder.path,
        logs=_logs(args, folder.path),
        router_url=f"http://{where}",
        listener=listener,
        invitation=Invitation(
            version=__version__,
            name=name,
            pairs=args.pairs,
            flags=args.server_flags,
            role_flags=args.role_flags,
            master="",
            store_size=args.store,
        ),
        servers=understood,
        host=_host(args.count, address, understood["regular"]),
        roles=_roles(args),
        router_flags=args.router_flags,
        store=bool(args.store),
        token=token,
        join="" if network.is_loopback(address) else f"moonlang up --join {where} --token {token} {servers}",
        parent=args.parent,
    )


def _guest(args: UpArgs, router: Address, stack: ExitStack) -> Setup:
    """This host's share in a cluster whose router is at `router`."""
    invitation = invite.ask(router, args.token)
    if args.pairs != invitation.pairs:
        legal = "--prefill N or --decode N" if invitation.pairs else "--replicas N"
        raise ConfigError(f"The cluster {invitation.name} takes servers by {legal}.")
    invitation = msgspec.structs.replace(invitation, flags=(*invitation.flags, *args.server_flags))
    understood = flags.understood(invitation.flags, invitation.role_flags)
    address = network.own_address(args.host) if args.host is not None else network.address_towards(*router)
    name, folder = directory.claim(args.name, default=f"{invitation.name[:16]}-guest")
    stack.callback(folder.remove)
    return Setup(
        name=name,
        directory=folder.path,
        logs=_logs(args, folder.path),
        router_url=f"http://{_written(router)}",
        listener=None,
        invitation=invitation,
        servers=understood,
        host=_host(args.count, address, understood["regular"]),
        roles=_roles(args),
        router_flags=(),
        store=False,
        token=args.token,
        join="",
        parent=args.parent,
    )


async def _live(setup: Setup, *, plain: bool) -> int:
    """Run it and show it. The exit status."""
    supervisor = Supervisor(setup)
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)  # the processes start before a terminal is thought of
    from moonlang.cluster.screen import Lines, LiveScreen

    live = sys.stdout.isatty() and not plain
    with contextlib.suppress(OSError), contextlib.closing(LiveScreen() if live else Lines()) as screen:
        while not running.done():
            screen.show(supervisor.status())
            await asyncio.wait([running], timeout=FRAME_S)
        screen.show(supervisor.status())
    status = await running  # also when whoever watched has gone away
    sys.stderr.write("".join(f"  {line}\n" for line in supervisor.last_lines))
    return status


def _roles(args: UpArgs) -> tuple[Role, ...]:
    counts: dict[Role, int] = {"prefill": args.prefill, "decode": args.decode, "regular": args.replicas}
    return tuple(role for role, count in counts.items() for _ in range(count))


def _logs(args: UpArgs, folder: Path) -> Path:
    """Where processes log to: with the cluster, or where they stay."""
    logs = folder / "logs" if args.log_dir is None else args.log_dir.expanduser().absolute()
    try:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {logs} cannot be used: {error.strerror}.") from None
    return logs


def _host(count: int, address: str, servers: ServerArgs) -> Host:
    cuda = host.has_cuda() if servers.device is None else servers.device == "cuda"
    alone = bool(lib.how_to_get()) and network.is_loopback(address)
    return Host(address=address, count=count, gpus=_gpus() if cuda else (), transfer_backend="local" if alone else None)


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(filter(None, visible.split(",")))
    return tuple(str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


def _written(address: Address) -> str:
    """host:port, as in a URL."""
    name, port = address
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


if __name__ == "__main__":
    sys.exit(main())
