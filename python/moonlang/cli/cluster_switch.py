"""`moonlang switch SERVER ROLE`: change what a running server does, without losing a request."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moonlang.cluster import control, directory
from moonlang.cluster.control import Order


def main(argv: Sequence[str]) -> int:
    """Return when the server works in its new role; the exit status."""
    parser = argparse.ArgumentParser(
        prog="moonlang switch",
        description="Give a server another role. The router sends it nothing more, what it has is finished, it starts "
        "again in the new role and takes requests again.",
    )
    parser.add_argument("server", help="like server-1; run this on the host where it is")
    parser.add_argument("role", choices=("prefill", "decode"))
    parser.add_argument("--name", help="of the cluster, when there are several")
    given = parser.parse_args(argv)
    card = directory.find(given.name)
    order = Order(do="switch", unit=given.server, role=given.role)
    control.ask(directory.folder(card.name), order, timeout_s=None)
    print(f"{given.server} is a {given.role} server now.")
    return 0
