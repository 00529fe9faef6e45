"""From values by flag name to `ServerArgs`: checks types, choices and bounds, and refuses what this version lacks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from moonlang.base import log
from moonlang.base.errors import ConfigError
from moonlang.config import flag, kv_events, table
from moonlang.config.server_args import ServerArgs
from moonlang.config.table import Row

_NUMBER_BOUND = 2**63

_log = log.get(__name__)


def build(values: Mapping[str, Any]) -> ServerArgs:
    """Keys are names of fields or flags, dashes or underscores, written out. All problems come in one ConfigError."""
    pairs: list[tuple[Row, Any]] = []
    problems: list[ConfigError] = []
    for name, value in values.items():
        try:
            pairs.append((_exact(name), value))
        except ConfigError as error:
            problems.append(error)
    return assemble(pairs, problems)


def assemble(pairs: Iterable[tuple[Row, Any]], problems: Iterable[ConfigError] = ()) -> ServerArgs:
    """`ServerArgs` from flags and their values; `problems`: those found so far. Warns of what has no effect."""
    settings: dict[str, Any] = {}
    found = list(problems)
    ineffective: list[Row] = []
    for row, value in pairs:
        try:
            settled = _settle(row, value)
        except ConfigError as error:
            found.append(error)
            continue
        if row.status == "noop" and settled != row.default:
            ineffective.append(row)
        if row.has_field:
            settings[row.dest] = settled
    _raise_all(found)
    args = ServerArgs(**settings)
    _raise_all(_cross_checks(args))
    for row in ineffective:
        _log.warning("Warning: %s has no effect: %s.", row.names[0], row.why)
    return args


def _settle(row: Row, value: Any) -> Any:
    """`value` in the type of the flag, or ConfigError. None and the default are always fine."""
    if value is None:
        return row.default
    value = _coerce(row, value)
    if value == row.default:
        return value
    if row.status == "refused":
        raise ConfigError(f"{row.names[0]} {_show(value)} is not supported.", hint=row.why)
    for item in value if row.nargs in ("+", "*") else (value,):
        _check_item(row, item)
    return value


def _raise_all(problems: Iterable[ConfigError]) -> None:
    """One error for all problems; nothing when there are none."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("\n".join(["Several flags are wrong:", *(f"- {problem}" for problem in found)]))


def _exact(name: str) -> Row:
    known = table.load()
    option = table.option_name(name)
    row = known.spellings.get(option) or known.exact.get(option)
    if row is None or row.dest == "config":
        raise ConfigError(f"There is no argument {name!r}.", hint=known.nearest(option))
    return row


def _coerce(row: Row, value: Any) -> Any:
    if row.nargs in ("+", "*"):
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_coerce_item(row, item) for item in items)
    return _coerce_item(row, value)


def _coerce_item(row: Row, value: Any) -> Any:
    """One value in the type of the flag: text is read as on the command line, JSON flags take objects too."""
    kind = row.kind.split("/")[0]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind == "str" and isinstance(value, (dict, list)):
        return msgspec.json.encode(value).decode()
    if kind != "str" and isinstance(value, str):
        try:
            return flag.PARSERS[kind](value)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{row.names[0]}: {error}.") from None
    wanted: Any = {"str": str, "int": int, "float": float, "bool": bool, "json": Any}[kind]
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        raise ConfigError(f"{row.names[0]} takes {_KINDS[kind]}, not {_show(value)}.") from None


_KINDS = {"str": "text", "int": "an integer", "float": "a number", "bool": "true or false", "json": "JSON"}


def _check_item(row: Row, value: Any) -> None:
    if row.choices and value not in row.choices:
        legal = ", ".join(str(choice) for choice in row.choices)
        raise ConfigError(f"{row.names[0]} {_show(value)} is not supported.", hint=f"Choose one of: {legal}.")
    # Children get the arguments as JSON: no NaN, no infinity, and integers of 64 bits.
    if row.kind in ("int", "float") and not abs(value) < _NUMBER_BOUND:
        raise ConfigError(f"{row.names[0]} is out of range.", hint="Give a finite number.")
    if row.flag is None:
        return
    if row.kind == "json":
        if not isinstance(value, dict):
            raise ConfigError(f"{row.names[0]} takes a JSON object, not {_show(value)}.")
        return
    low, high = row.flag.low, row.flag.high
    if low is not None and value < low:
        raise ConfigError(f"{row.names[0]} {value} is too small.", hint=f"The smallest value is {low}.")
    if high is not None and value > high:
        raise ConfigError(f"{row.names[0]} {value} is too large.", hint=f"The largest value is {high}.")


def _cross_checks(args: ServerArgs) -> Iterable[ConfigError]:
    """What no flag can check alone."""
    if args.chunked_prefill_size == 0:
        yield ConfigError("--chunked-prefill-size 0 computes nothing.", hint="Use -1 to turn chunking off.")
    if (args.ssl_keyfile is None) != (args.ssl_certfile is None):
        yield ConfigError("--ssl-keyfile and --ssl-certfile go together.", hint="Give both, or none.")
    if args.in_process and args.messaging_backend in ("zmq", "mooncake"):
        text = f"--in-process has no use for --messaging-backend {args.messaging_backend}."
        yield ConfigError(text, hint="Leave out one of the two.")
    if args.messaging_backend == "inproc" and not args.in_process:
        yield ConfigError("--messaging-backend inproc reaches no other process.", hint="Add --in-process.")
    if args.disaggregation_decode_fallback and args.disaggregation_mode != "decode":
        yield ConfigError(
            f"--disaggregation-decode-fallback does nothing with --disaggregation-mode {args.disaggregation_mode}.",
            hint="Leave it out here; it belongs to decode servers.",
        )
    try:
        events = kv_events.parse(args.kv_events_config)
    except ConfigError as error:
        yield error
    else:
        if events is not None and args.disable_radix_cache:
            yield ConfigError("--kv-events-config has nothing to tell with --disable-radix-cache.", hint="Drop one.")
    if not isinstance(_json(args.json_model_override_args), dict):
        yield ConfigError("--json-model-override-args takes a JSON object.", hint="""Like '{"rope_theta": 10000}'.""")


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None


def _show(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
