"""`moonlang doctor [flags of serve]`: is everything here that a server needs? Every failing line says the fix."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from moonlang.cli import host_checks, model_checks, mooncake_checks
from moonlang.cli.check import Check
from moonlang.config.server_args import ServerArgs, parse

MARKS = {"ok": "ok  ", "warning": "note", "failed": "FAIL"}


def main(argv: Sequence[str]) -> int:
    """0 when a server can start, 1 when something must be fixed first."""
    parser = argparse.ArgumentParser(
        prog="moonlang doctor",
        description="Check this machine and the model, and say how to fix what is wrong.",
        epilog="All other flags are those of `moonlang serve`: give those that the server will get.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    own, rest = parser.parse_known_args(argv)
    checks = examine(parse(rest))
    failed = sum(check.status == "failed" for check in checks)
    if own.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
        return 1 if failed else 0
    for check in checks:
        print(f"{MARKS[check.status]}  {check.name:<16} {check.text}")
        if check.fix:
            print(f"{'':<22} -> {check.fix}")
    print(f"\n{failed} to fix before a server can start." if failed else "\nA server can start.")
    return 1 if failed else 0


def examine(args: ServerArgs) -> list[Check]:
    """All checks, in the order in which one would fix them."""
    return [*host_checks.run(args), *mooncake_checks.run(args), *model_checks.run(args)]
