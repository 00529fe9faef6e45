"""What a flag is made of: the annotation of a `ServerArgs` field, and the text forms of its value."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import msgspec

_LONGEST = 40
_SUFFIX = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_INT = re.compile(r"(-?\d[\d_]*(?:\.\d+)?)([kmgtKMGT]?)(i?)")


@dataclass(frozen=True, slots=True)
class Flag:
    """The annotation of one field of `ServerArgs`. Its name, type and default are those of the field."""

    help: str
    choices: tuple[str | int, ...] = ()  # empty: any value of the type, or the choices of the flag table
    low: float | None = None  # the smallest legal value
    high: float | None = None  # the largest legal value


def parse_int(text: str) -> int:
    """An integer as people write it: `32000`, `32k` (32,000), `32Ki` (32,768), `1.5M`."""
    match = _INT.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or (match[3] and not match[2]):
        shown = text[:_LONGEST]
        raise argparse.ArgumentTypeError(f"{shown!r} is not an integer; write it like 4096, 4k (4,000) or 4Ki (4,096)")
    factor = (1024 if match[3] else 1000) ** _SUFFIX[match[2].lower()]
    if "." not in match[1]:
        return int(match[1]) * factor
    value = float(match[1]) * factor
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_json(text: str) -> Any:
    """JSON text as a flag's value."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None


def parse_bool(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value


PARSERS = {"str": str, "int": parse_int, "float": parse_float, "json": parse_json, "bool": parse_bool}
