"""`moonlang COMMAND ...`: each command is a module that is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from moonlang.base.errors import ConfigError
from moonlang.version import __version__

# Name -> (module with `main(argv) -> int`, what it does).
COMMANDS = {
    "serve": ("moonlang.launch_server", "start a server (the same as python -m moonlang.launch_server)"),
    "up": ("moonlang.cluster.command", "start a cluster: router, servers, store; or join one"),
    "status": ("moonlang.cli.clusters", "how the clusters on this host are"),
    "logs": ("moonlang.cli.cluster_logs", "what a process of a cluster prints"),
    "switch": ("moonlang.cli.cluster_switch", "make a prefill server a decode server, or the other way round"),
    "down": ("moonlang.cli.cluster_down", "end a cluster"),
    "router": ("moonlang.router.command", "one address in front of many servers, alone or in pairs"),
    "doctor": ("moonlang.cli.doctor", "check this machine and the model, say how to fix what is wrong"),
    "explain": ("moonlang.cli.explain", "show what the flags of `serve` resolve to, and why"),
    "flags": ("moonlang.cli.flags", "list all flags of SGLang and what becomes of each here"),
    "bench": ("moonlang.bench.command", "measure this machine: messages between processes"),
    "sim": ("moonlang.sim.main", "run the scheduler under virtual time against its checkers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"moonlang {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"Error: there is no command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        run: Callable[[Sequence[str]], int] = import_module(COMMANDS[words[0]][0]).main
        return run(words[1:])
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # what runs for long minds signals by itself; this is while modules are loaded
        return 130
    except BrokenPipeError:  # `moonlang flags | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 1


def usage() -> str:
    lines = ["usage: moonlang COMMAND ...", "", "commands:"]
    lines += [f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`moonlang COMMAND --help` says more."])
