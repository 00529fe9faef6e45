"""All flags this program knows: the fields of `ServerArgs` and the rows of `sglang_flags.json`, in one form.

A row's status is one of
  supported   it has a field in `ServerArgs` and takes effect
  noop        accepted; one warning says why it has no effect
  refused     any value but SGLang's default is an error that says what to do instead
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from moonlang.base.errors import ConfigError
from moonlang.config.flag import Flag
from moonlang.config.server_args import ServerArgs

OWN_SECTION = "moonlang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One flag. `kind`: str, int, float, bool, bool/no (with a --no- form) or json; `why` explains noop and refused."""

    names: tuple[str, ...]
    section: str
    kind: str
    default: Any
    nargs: str | None = None
    choices: tuple[str | int, ...] = ()
    status: str = "supported"
    why: str = ""
    flag: Flag | None = None  # set when `ServerArgs` has the field

    @property
    def dest(self) -> str:
        """The name of the field, and the key in a YAML file or a keyword argument."""
        return field_name(self.names[0])

    @property
    def has_field(self) -> bool:
        return self.flag is not None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by the name of their field, and every spelling of every flag. Iteration order is that of the file."""

    rows: Mapping[str, Row]
    spellings: Mapping[str, Row]  # "--tp-size", "--tensor-parallel-size", ...: what may be abbreviated
    exact: Mapping[str, Row]  # spellings that may not be abbreviated: those of older versions, and MoonLang's own
    sglang: str  # the version of SGLang that the file describes

    def find(self, name: str) -> Row:
        """The row that `name` ("--tp-size", "--tp", "tp_size") means, abbreviated as in argparse, or ConfigError."""
        option = option_name(name)
        row = self.spellings.get(option) or self.exact.get(option) or self._abbreviated(option)
        if row is None:
            raise ConfigError(f"There is no flag {option}.", hint=self.nearest(option))
        return row

    def _abbreviated(self, option: str) -> Row | None:
        for spellings in (self.spellings, self.exact):
            found = {row.dest: row for spelling, row in spellings.items() if spelling.startswith(option)}
            if len(found) == 1:
                return next(iter(found.values()))
            if found:
                names = ", ".join(row.names[0] for row in list(found.values())[:6])
                raise ConfigError(f"The flag {option} is short for several.", hint=f"Write one of them out: {names}.")
        return None

    def nearest(self, option: str) -> str:
        """A hint with the flags closest to a name that does not exist."""
        near = difflib.get_close_matches(option, [*self.spellings, *self.exact], n=3, cutoff=0.6)
        return f"Closest: {', '.join(near)}." if near else "`moonlang flags` lists them all."


def option_name(name: str) -> str:
    """`tp_size` or `tp-size` -> `--tp-size`; a name that has its dashes stays."""
    return name if name.startswith("--") else "--" + name.replace("_", "-")


def field_name(option: str) -> str:
    """`--tp-size` -> `tp_size`."""
    return option.removeprefix("--").replace("-", "_")


@cache
def load() -> Table:
    """Read the file once and join it with the fields of `ServerArgs`."""
    data = json.loads(resources.files("moonlang.config").joinpath("sglang_flags.json").read_text("utf-8"))
    fields = {field.name: field for field in dataclasses.fields(ServerArgs)}
    annotations = typing.get_type_hints(ServerArgs, include_extras=True)
    rows: dict[str, Row] = {}
    removed: dict[str, Row] = {}
    for entry in data["flags"]:
        row = _row_of_entry(entry, data)
        if row.section == "removed":
            removed[row.dest] = row
            continue
        if row.dest in fields:
            row = _with_field(row, annotations[row.dest], fields[row.dest].default)
        rows[row.dest] = row
    for name, field in fields.items():
        if name not in rows:
            blank = Row(names=(option_name(name),), section=OWN_SECTION, kind="", default=None)
            rows[name] = _with_field(blank, annotations[name], field.default)
    spellings = {name: row for row in rows.values() if row.section != OWN_SECTION for name in row.names}
    exact = {name: row for row in rows.values() if row.section == OWN_SECTION for name in row.names}
    exact |= {row.names[0]: row for row in removed.values()}
    exact |= {old: spellings[new] for old, new in data["old_spellings"].items()}
    return Table(rows | removed, spellings, exact, data["sglang"])


def _row_of_entry(entry: dict[str, Any], data: dict[str, Any]) -> Row:
    choices = entry.get("choices", ())
    if isinstance(choices, str):
        choices = data["choice_lists"][choices]
    default = entry["default"]
    return Row(
        names=tuple(entry["names"]),
        section=entry["section"],
        kind=entry["type"],
        default=tuple(default) if isinstance(default, list) else default,
        nargs=entry.get("nargs"),
        choices=tuple(int(c) for c in choices) if entry["type"] == "int" else tuple(choices),
        status=entry["status"],
        why=data["reasons"][entry["why"]] if "why" in entry else "",
    )


def _with_field(row: Row, annotation: Any, default: Any) -> Row:
    """The row with what the field of `ServerArgs` says: type, default, and choices where the field narrows them."""
    base, flag = typing.get_args(annotation)[:2]
    kind, nargs = _kind(base)
    if row.kind == "bool/no":
        kind = row.kind
    return dataclasses.replace(
        row, kind=kind, nargs=row.nargs or nargs, default=default, choices=flag.choices or row.choices, flag=flag
    )


def _kind(base: Any) -> tuple[str, str | None]:
    """The kind and nargs of a field's type: int | None -> int; tuple[str, ...] -> str, several; dict -> json."""
    if isinstance(base, types.UnionType):
        base = next(arm for arm in typing.get_args(base) if arm is not types.NoneType)
    origin = typing.get_origin(base)
    if origin is tuple:
        return typing.get_args(base)[0].__name__, "+"
    if origin is dict:
        return "json", None
    return base.__name__, None
