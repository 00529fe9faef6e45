"""`moonlang doctor [flags of serve]`: is everything here that a server needs? Every failing line says the fix."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from moonlang.cli import fabric_checks, host_checks, library_checks, model_checks, mooncake_checks, reach
from moonlang.cli.check import Check
from moonlang.config.server_args import ServerArgs, parse

MARKS = {"ok": "ok  ", "warning": "note", "failed": "FAIL"}


def main(argv: Sequence[str]) -> int:
    """0 when a server can start and all peers are reached, 1 when something must be fixed first."""
    own, rest = _parser().parse_known_args(argv)
    if own.listen is not None:
        return reach.listen(own.listen, own.token)
    checks = examine(parse(rest))
    for peer in own.peer:
        checks += reach.checks(peer, own.token)
    failed = sum(check.status == "failed" for check in checks)
    if own.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
        return 1 if failed else 0
    for check in checks:
        print(f"{MARKS[check.status]}  {check.name:<18} {check.text}")
        if check.fix:
            print(f"{'':<24} -> {check.fix}")
    print(f"\n{failed} to fix before a server can start." if failed else "\nA server can start.")
    return 1 if failed else 0


def examine(args: ServerArgs) -> list[Check]:
    """All checks of this machine, in the order in which one would fix them."""
    return [
        *host_checks.run(args),
        *library_checks.run(args),
        *fabric_checks.run(),
        *mooncake_checks.run(args),
        *model_checks.run(args),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moonlang doctor",
        description="Check this machine, the model and the way to other hosts, and say how to fix what is wrong.",
        epilog="All other flags are those of `moonlang serve`: give those that the server will get.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="HOST:PORT", help="check the way to and from this host as well"
    )
    parser.add_argument(
        "--listen", nargs="?", const="0", metavar="[HOST:]PORT", help="be the host that --peer names elsewhere"
    )
    parser.add_argument("--token", default="", help="what --listen has printed, or should ask for")
    return parser
