"""`moonlang explain [flags of serve]`: every argument and where its value comes from, and what computes what."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from moonlang.config import table
from moonlang.config.host import cpu_kernels
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs, parse
from moonlang.kernels.table import Facts, choices
from moonlang.models.registry import has_own_file

_OPERATION = "operation "


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="moonlang explain",
        description="Show what the flags of `moonlang serve` resolve to, which code computes what, and why.",
        epilog="All other flags are those of `moonlang serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="also arguments that have their default")
    own, rest = parser.parse_known_args(argv)
    given = parse(rest)
    prepared = prepare(given)
    lines = explain(given, prepared)
    if not own.all:
        lines = [line for line in lines if line["source"] != "default"]
    lines += operations(prepared)
    if own.json:
        print(json.dumps(lines, indent=1))
        return 0
    for line in lines:
        name = str(line["name"])
        shown = name if name.startswith(_OPERATION) else table.option_name(name)
        print(f"{shown:<36} {line['value']!s:<28} {line['source']}")
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


def operations(prepared: Prepared) -> list[dict[str, object]]:
    """Every operation of the model, the implementation that computes it, and why that one."""
    args = prepared.args
    facts = Facts(
        device=args.device or "cpu",
        dtype=prepared.model.dtype,
        isa=cpu_kernels(),
        attention_backend=args.attention_backend or "torch_native",
        own_model=has_own_file(prepared.model, args.model_impl),
    )
    return [
        {"name": _OPERATION + choice.operation, "value": choice.implementation, "source": choice.reason}
        for choice in choices(facts)
    ]
