"""`moonlang status [NAME]`: the clusters of this user on this host."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from moonlang.base.errors import PeerError
from moonlang.cluster import control, directory
from moonlang.cluster.control import Order
from moonlang.cluster.status import Status


def main(argv: Sequence[str]) -> int:
    """Print them. The exit status: 0 when all that were asked for are ready."""
    parser = argparse.ArgumentParser(prog="moonlang status", description="Show the clusters of this host.")
    parser.add_argument("name", nargs="?", help="of one cluster; all without it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    cards = directory.running() if given.name is None else [directory.find(given.name)]
    found: list[Status] = []
    for card in cards:
        try:
            status = control.ask(directory.folder(card.name), Order(do="status")).status
        except PeerError:
            continue  # it has just ended
        if status is not None:
            found.append(status)
    if given.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _show(found)
    return 0 if all(status.state == "ready" for status in found) else 1


def _show(found: list[Status]) -> None:
    from rich.console import Console

    from moonlang.cluster.screen import picture

    console = Console(soft_wrap=True)
    if not found:
        console.print("No cluster of yours runs on this host. Start one with `moonlang up`.")
    for status in found:
        console.print(picture(status, hints=False))
        if status.join:
            console.print(f"Another host joins with:  {status.join}", highlight=False, markup=False)
