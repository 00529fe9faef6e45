"""Writes the reference of the router's flags: `python -m moonlang.router.reference [FILE]`, by default into docs."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from moonlang.config.flag import Flag
from moonlang.router.args import NO_EFFECT, RouterArgs, option

FILE = Path(__file__).parents[3] / "docs" / "reference" / "router-flags.md"


def text() -> str:
    """The whole page, from the fields of `RouterArgs` alone."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Flags of the router"
    yield ""
    yield "Written by `python -m moonlang.router.reference`; do not edit."
    yield ""
    yield (
        "`moonlang router` and `python -m moonlang.router` take the flags of `sglang_router` for HTTP servers. "
        "`python -m sglang.srt.disaggregation.mini_lb` is the same program with `--port 8000` and pairs drawn by lot. "
        "URLs may be given in several flags, in one flag, and separated by commas. What the flags are for is told in "
        "[Run a router](../how-to/router.md)."
    )
    yield from ["", "| Flag | Default | Meaning |", "|---|---|---|"]
    hints = typing.get_type_hints(RouterArgs, include_extras=True)
    for field in dataclasses.fields(RouterArgs):
        flag: Flag = typing.get_args(hints[field.name])[1]
        default = "" if field.default in (None, False, ()) else f"`{field.default}`"
        choices = f" ({', '.join(map(str, flag.choices))})" if flag.choices else ""
        yield f"| `{option(field.name)}` | {default} | {flag.help}{choices} |"
    yield from ["", "## Accepted without effect", "", "| Flag | Why |", "|---|---|"]
    for name, why in NO_EFFECT.items():
        yield f"| `{option(name)}` | {why[0].upper()}{why[1:]}. |"


def main(argv: Sequence[str]) -> int:
    file = Path(argv[0]) if argv else FILE
    file.write_text(text(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
