"""Entry of every process of a cluster: `python -m moonlang.cluster.member PARENT DIRECTORY KIND ARGUMENTS`.

It ends when its parent does, however that one ends. KIND server, router or program; a router's first argument is the
number of the socket that it has inherited, a program's is its path.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from moonlang.base.errors import BugError, ConfigError
from moonlang.roles import lifeline


def main(parent_pid: int, directory: Path, kind: str, arguments: Sequence[str]) -> int:
    """The exit status of what it turns into."""
    if kind == "program":
        lifeline.become(arguments, parent_pid)
    lifeline.die_with(parent_pid, directory)
    lifeline.finished_loading()  # the thread that waits for the parent's end can always run: no long C code here
    lifeline.set_title(f"moonlang::{kind}")
    if kind == "server":
        from moonlang import launch_server

        return launch_server.main(arguments)
    if kind == "router":
        return _router(socket.socket(fileno=int(arguments[0])), arguments[1:])
    raise BugError(f"A member of a cluster is no {kind!r}.")


def _router(listener: socket.socket, flags: Sequence[str]) -> int:
    from moonlang.router.args import parse
    from moonlang.router.server import serve

    try:
        return serve(parse(flags), listener)
    except ConfigError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
