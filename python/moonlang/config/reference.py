"""Writes the flag reference: `python -m moonlang.config.reference [FILE]`, by default docs/reference/flags.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moonlang.config import table
from moonlang.config.command_line import SECTIONS
from moonlang.config.table import Row

FILE = Path(__file__).parents[3] / "docs" / "reference" / "flags.md"


def text() -> str:
    """The whole page, from the flag table alone: the same table gives the same page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    known = table.load()
    rows = list(known.rows.values())
    count = {status: sum(row.status == status for row in rows) for status in ("supported", "noop", "refused")}
    yield "# Flags of the server"
    yield ""
    yield "Written by `python -m moonlang.config.reference`; do not edit."
    yield ""
    yield (
        f"`moonlang serve`, `python -m moonlang.launch_server` and `python -m sglang.launch_server` know all flags of "
        f"SGLang {known.sglang}: {count['supported']} work, {count['noop']} are accepted and have no effect here (one "
        f"warning says why), and {count['refused']} are refused unless they have their default value. A flag may be "
        f"abbreviated as long as it stays unambiguous. Integers may be written as `32k` (32,000) or `32Ki` (32,768). "
        f"`--config FILE` reads flags from a YAML file; the command line wins. `moonlang explain [flags]` shows what "
        f"every automatic value becomes, and why."
    )
    for section, title in SECTIONS.items():
        chosen = [row for row in rows if row.section == section and row.status == "supported"]
        yield from ["", f"## {title[0].upper()}{title[1:]}", ""]
        yield from ["| Flag | Value | Default | Meaning |", "|---|---|---|---|"]
        yield from map(_supported, chosen)
    yield from ["", "## Accepted without effect", "", "| Flags | Why |", "|---|---|"]
    yield from _by_reason(row for row in rows if row.status == "noop")
    yield from ["", "## Refused", "", "| Flags | Why, and what to do |", "|---|---|"]
    yield from _by_reason(row for row in rows if row.status == "refused")
    yield from ["", "## Spellings of older versions", "", "| Spelling | Read as |", "|---|---|"]
    for old, row in known.exact.items():
        if old not in row.names:
            yield f"| `{old}` | `{row.names[0]}` |"


_VALUES = {
    "bool": "",
    "bool/no": "none, or `--no-` before it",
    "str": "text",
    "int": "integer",
    "float": "number",
    "json": "JSON object",
}


def _supported(row: Row) -> str:
    names = " ".join(f"`{name}`" for name in row.names)
    if row.choices:
        value = ", ".join(str(choice) for choice in row.choices)
    else:
        value = _VALUES[row.kind]
    default = "" if row.default in (None, False, (), "") else f"`{row.default}`"
    meaning = row.flag.help if row.flag is not None else "YAML file of flags"
    return f"| {names} | {value}{' ...' if row.nargs else ''} | {default} | {meaning} |"


def _by_reason(rows: Iterable[Row]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.why, []).append(f"`{row.names[0]}`")
    for why, names in groups.items():
        yield f"| {' '.join(names)} | {why[0].upper()}{why[1:].rstrip('.')}. |"


def main(argv: Sequence[str]) -> int:
    file = Path(argv[0]) if argv else FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
