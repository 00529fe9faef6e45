"""`moonlang down [NAME]`: end a cluster in order; requests under way are finished."""

from __future__ import annotations

import argparse
import os
import select
import signal
from collections.abc import Sequence

from moonlang.base.errors import ConfigError
from moonlang.cluster import control, directory
from moonlang.cluster.control import Order

PATIENCE_S = 300.0


def main(argv: Sequence[str]) -> int:
    """Return when it is gone; the exit status."""
    parser = argparse.ArgumentParser(prog="moonlang down", description="End a cluster of this host.")
    parser.add_argument("name", nargs="?", help="of the cluster, when there are several")
    parser.add_argument("--now", action="store_true", help="requests under way are not finished")
    given = parser.parse_args(argv)
    card = directory.find(given.name)
    process = os.pidfd_open(card.pid)
    try:
        control.ask(directory.folder(card.name), Order(do="down"))
        if given.now:
            signal.pidfd_send_signal(process, signal.SIGINT)  # as a second Ctrl-C
        if not select.select([process], [], [], PATIENCE_S)[0]:
            raise ConfigError(f"The cluster {card.name} still ends.", hint="`moonlang down --now` does not wait.")
    finally:
        os.close(process)
    print(f"The cluster {card.name} has ended.")
    return 0
