"""`moonlang explain [flags of serve]`: every argument, its value, and where the value comes from."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from moonlang.config import table
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs, parse


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="moonlang explain",
        description="Show what the flags of `moonlang serve` resolve to, and why. Starts nothing.",
        epilog="All other flags are those of `moonlang serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="also arguments that have their default")
    own, rest = parser.parse_known_args(argv)
    given = parse(rest)
    lines = explain(given, prepare(given))
    if not own.all:
        lines = [line for line in lines if line["source"] != "default"]
    if own.json:
        print(json.dumps(lines, indent=1))
        return 0
    for line in lines:
        print(f"{table.option_name(str(line['name'])):<36} {line['value']!s:<28} {line['source']}")
    return 0


def explain(given: ServerArgs, prepared: Prepared) -> list[dict[str, object]]:
    """Name, value and source (given, default, or the reason of an automatic value) of every supported argument."""
    rows = table.load().rows
    lines: list[dict[str, object]] = []
    for field in dataclasses.fields(ServerArgs):
        if rows[field.name].status != "supported":
            continue
        source = "default" if getattr(given, field.name) == field.default else "given"
        source = prepared.reasons.get(field.name, source)
        lines.append({"name": field.name, "value": getattr(prepared.args, field.name), "source": source})
    return lines
