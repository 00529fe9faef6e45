"""The command line: names are written out first (abbreviations, old spellings), then argparse reads the values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from moonlang.base.errors import ConfigError
from moonlang.config import build, flag, table
from moonlang.config.server_args import ServerArgs
from moonlang.config.table import Row

_NEGATION = "--no-"
_OPTION = re.compile(r"--[A-Za-z][\w-]*")
SECTIONS = {
    "model": "model and weights",
    "serving": "tokenizer, HTTP and the API",
    "scheduling": "scheduling and memory",
    "cache": "prefix cache",
    "kernels": "kernels and grammars",
    "features": "optional features",
    "device": "device and process",
    "parallelism": "several devices or processes",
    "moe": "mixtures of experts",
    "overlap": "overlap of computing and waiting",
    "disaggregation": "prefill/decode disaggregation",
    "observability": "logs and metrics",
    table.OWN_SECTION: "MoonLang's own",
    "other": "other",
}


def read(argv: Sequence[str]) -> ServerArgs:
    """`ServerArgs` from a command line; --config names a YAML file of values for what the command line leaves out."""
    given = vars(_parser().parse_args(_written_out(argv)))
    config = given.pop("config", None)
    values = _read_file(Path(config)) if config is not None else {}
    values |= given
    rows = table.load().rows
    return build.assemble((rows[dest], value) for dest, value in values.items())


def _written_out(argv: Sequence[str]) -> list[str]:
    """Every option by its first name: `--tp=2` -> `--tp-size=2`, `--pp` -> `--pp-size`."""
    known = table.load()
    result: list[str] = []
    for position, token in enumerate(argv):
        if token == "--":
            return [*result, *argv[position:]]
        name, equals, value = token.partition("=")
        if _OPTION.fullmatch(name) is None or name == "--help":
            result.append(token)
        elif name.startswith(_NEGATION):
            result.append(_NEGATION + known.find("--" + name.removeprefix(_NEGATION)).names[0][2:] + equals + value)
        else:
            result.append(known.find(name).names[0] + equals + value)
    return result


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".", hint="`--help` shows the flags.")


@cache
def _parser() -> _Parser:
    parser = _Parser(
        prog="moonlang serve",
        usage="%(prog)s [--model-path MODEL] [flags]",
        description="Serve a language model over HTTP, compatible with SGLang.",
        epilog="`moonlang flags` lists all flags of SGLang and what becomes of each here.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {section: parser.add_argument_group(title) for section, title in SECTIONS.items()}
    for row in table.load().rows.values():
        target = groups[row.section] if row.status == "supported" else parser
        target.add_argument(row.names[0], dest=row.dest, help=_help(row), **_shape(row))
    return parser


def _shape(row: Row) -> dict[str, Any]:
    """How argparse reads the value."""
    if row.kind == "bool":
        return {"action": "store_true"}
    if row.kind == "bool/no":
        return {"action": argparse.BooleanOptionalAction}
    shape: dict[str, Any] = {"type": flag.PARSERS[row.kind], "metavar": _metavar(row)}
    if row.nargs is not None:
        shape["nargs"] = row.nargs
    return shape


def _metavar(row: Row) -> str:
    if row.choices and row.status == "supported":
        return "{" + ",".join(map(str, row.choices)) + "}"
    return {"int": "N", "float": "X", "json": "JSON"}.get(row.kind, "TEXT")


def _help(row: Row) -> str:
    if row.status != "supported":
        return argparse.SUPPRESS
    if row.dest == "config":
        return "YAML file of flags; the command line wins"
    assert row.flag is not None
    default = "" if row.default in (None, "", False, ()) else f" ({row.default})"
    return (row.flag.help + default).replace("%", "%%")


def _read_file(path: Path) -> dict[str, Any]:
    """The values of a YAML file by `Row.dest`. ConfigError on anything that is not a mapping of known flags."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read: {error.strerror}.", hint="Give the path of a YAML file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}.", hint="One `flag: value` per line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds no mapping.", hint="One `flag: value` per line.")
    known = table.load()
    values = {known.find(str(key)).dest: value for key, value in content.items()}
    if "config" in values:
        raise ConfigError(f"--config {path} names another file.", hint="Put all flags into one file.")
    return values
