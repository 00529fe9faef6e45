"""`moonlang flags [WORD]`: the flag table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moonlang.config import table

STATUSES = ("supported", "noop", "refused")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="moonlang flags", description="List the flags, with what becomes of each.")
    parser.add_argument("word", nargs="?", default="", help="only flags whose name contains it")
    parser.add_argument("--status", choices=STATUSES, help="only flags of this status")
    own = parser.parse_args(argv)
    found = 0
    for row in table.load().rows.values():
        if own.word in row.names[0] and own.status in (None, row.status):
            print(f"{row.status:<10} {' '.join(row.names)}\n{'':<11}{_says(row)}")
            found += 1
    return 0 if found else 1


def _says(row: table.Row) -> str:
    return row.why or (row.flag.help if row.flag is not None else "YAML file of flags")
