"""The flags of the router: one annotated line per flag, named as those of sglang_router.

No `from __future__ import annotations` here: the annotations are read at run time.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from moonlang.base import log
from moonlang.base.errors import ConfigError
from moonlang.config.flag import PARSERS, Flag
from moonlang.router.policy import NAMES
from moonlang.router.workers import checked_url

_log = log.get(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# Flags of sglang_router whose purpose is served without them.
NO_EFFECT = {
    "worker_startup_timeout_secs": "the router starts at once and takes workers in as they come up",
    "worker_startup_check_interval": "a worker that is not up is checked several times a second",
    "eviction_interval_secs": "prefixes are forgotten as soon as there are too many",
    "request_timeout_secs": "a request may take as long as its worker is alive",
    "prometheus_port": "metrics are on /metrics of --port",
    "prometheus_host": "metrics are on /metrics of --host",
    "model_path": "the router does not tokenise",
    "tokenizer_path": "the router does not tokenise",
    "log_dir": "the log goes to stderr",
    "timeout": "a request may take as long as its worker is alive",
    "prefill_bootstrap_ports": "prefill servers are asked for theirs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterArgs:
    """All that can be set at start. Build it with `parse`: the constructor does not check anything."""

    host: Annotated[str, Flag("Address to listen on")] = "0.0.0.0"
    port: Annotated[int, Flag("Port to listen on; 0: a free one", low=0, high=65535)] = 30000

    # Workers
    worker_urls: Annotated[tuple[str, ...], Flag("Servers that work alone")] = ()
    pd_disaggregation: Annotated[bool, Flag("Pairs of prefill and decode servers; implied by --prefill")] = False
    prefill: Annotated[
        tuple[tuple[str, int | None], ...],
        Flag("URL [PORT]: a prefill server and its bootstrap port, which it is asked for if left out; repeatable"),
    ] = ()
    decode: Annotated[tuple[str, ...], Flag("URL of a decode server; repeatable")] = ()

    # Choice
    policy: Annotated[str, Flag("Which worker gets a request", NAMES)] = "cache_aware"
    prefill_policy: Annotated[str | None, Flag("The same for prefill servers; default: --policy", NAMES)] = None
    decode_policy: Annotated[str | None, Flag("The same for decode servers; default: power_of_two", NAMES)] = None
    cache_threshold: Annotated[float, Flag("Share of a prompt that a worker must know", low=0, high=1)] = 0.3
    balance_abs_threshold: Annotated[int, Flag("Requests more than the idlest worker has: uneven", low=0)] = 64
    balance_rel_threshold: Annotated[float, Flag("...and as many times what the idlest has", low=1)] = 1.5
    max_tree_size: Annotated[int, Flag("Characters of prompts remembered per worker", low=0)] = 1 << 24

    # Health
    health_check_interval_secs: Annotated[float, Flag("Between two checks of a worker", low=0.01)] = 5.0
    health_check_timeout_secs: Annotated[float, Flag("A check that takes longer has failed", low=0.01)] = 5.0
    health_failure_threshold: Annotated[int, Flag("Failed checks in a row: down", low=1)] = 3
    health_success_threshold: Annotated[int, Flag("Good checks in a row: up again", low=1)] = 2
    health_check_endpoint: Annotated[str, Flag("Path that is checked")] = "/health"

    # Failures
    retry_max_retries: Annotated[int, Flag("Further attempts, before the first byte is out", low=0, high=100)] = 5
    retry_initial_backoff_ms: Annotated[float, Flag("Wait before the second attempt", low=0)] = 50.0
    retry_max_backoff_ms: Annotated[float, Flag("Longest wait before an attempt", low=0)] = 30_000.0
    retry_backoff_multiplier: Annotated[float, Flag("Each wait over the one before", low=1)] = 1.5
    retry_jitter_factor: Annotated[float, Flag("Share of a wait that is left to chance", low=0, high=1)] = 0.2
    disable_retries: Annotated[bool, Flag("One attempt per request")] = False
    cb_failure_threshold: Annotated[int, Flag("Failures that open a worker's breaker", low=1)] = 10
    cb_success_threshold: Annotated[int, Flag("Successes in a row that close it again", low=1)] = 3
    cb_timeout_duration_secs: Annotated[float, Flag("How long it stays open", low=0)] = 60.0
    cb_window_duration_secs: Annotated[float, Flag("The failures happen within this time", low=0)] = 120.0
    disable_circuit_breaker: Annotated[bool, Flag("No breaker")] = False

    # Limits, keys, log
    max_concurrent_requests: Annotated[int, Flag("Most requests at once, then 429; -1: no limit", low=-1)] = -1
    max_payload_size: Annotated[int, Flag("Largest body of a request in bytes", low=1)] = 512 << 20
    shutdown_grace_period_secs: Annotated[int, Flag("How long requests may still run after SIGTERM", low=0)] = 180
    api_key: Annotated[str | None, Flag("Key that clients must send; the router sends it to workers too")] = None
    log_level: Annotated[str, Flag("Level of the log", LOG_LEVELS)] = "info"
    cluster_card: Annotated[str | None, Flag("File that tells hosts how to join, written by `moonlang up`")] = None

    @property
    def pairs(self) -> bool:
        """True in front of prefill and decode servers."""
        return self.pd_disaggregation or bool(self.prefill or self.decode)


def parse(argv: Sequence[str], prog: str = "moonlang router", **defaults: Any) -> RouterArgs:
    """Read a command line (without the program's name). Prints help and exits on --help; ConfigError on bad input."""
    parser = _Parser(prog=prog, description="One address in front of many servers.", allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(RouterArgs)}
    hints = typing.get_type_hints(RouterArgs, include_extras=True)
    for name, field in fields.items():
        kind, flag = typing.get_args(hints[name])[:2]
        parser.add_argument(option(name), **_shape(name, kind, flag, defaults.get(name, field.default)))
    for name in NO_EFFECT:
        parser.add_argument(option(name), nargs="*", default=None, help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [option(name) for name in fields], n=2)
        hint = f"Closest: {', '.join(near)}." if near else "`--help` lists the flags."
        raise ConfigError(f"There is no flag {unknown[0]}.", hint=hint)
    values = {name: value for name, value in vars(found).items() if value is not None}
    for name in NO_EFFECT:
        if values.pop(name, None) is not None:
            _log.warning("%s has no effect: %s.", option(name), NO_EFFECT[name])
    values |= {
        "worker_urls": _urls(values.get("worker_urls", ())),
        "prefill": _prefills(values.get("prefill", ())),
        "decode": _urls([word for words in values.get("decode", ()) for word in words]),
    }
    return _checked(RouterArgs(**values), hints)


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".", hint="`--help` shows the flags.")


def option(name: str) -> str:
    """The flag of a field: `max_tree_size` -> `--max-tree-size`."""
    return "--" + name.replace("_", "-")


def _shape(name: str, kind: Any, flag: Flag, default: Any) -> dict[str, Any]:
    """How argparse reads one flag."""
    text = flag.help + ("" if default in (None, False, ()) else f" ({default})")
    shape: dict[str, Any] = {"default": default, "help": text.replace("%", "%%")}
    if kind is bool:
        return shape | {"action": "store_true"}
    if name in ("prefill", "decode"):
        return shape | {"action": "append", "nargs": "+", "metavar": "URL", "default": []}
    if name == "worker_urls":
        return shape | {"action": "extend", "nargs": "*", "metavar": "URL", "default": []}
    if isinstance(kind, types.UnionType):
        kind = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
    metavar = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else {int: "N", float: "X"}.get(kind, "TEXT")
    return shape | {"type": PARSERS[kind.__name__], "metavar": metavar}


def _urls(words: Sequence[str]) -> tuple[str, ...]:
    """URLs from words that may hold several, separated by commas."""
    return tuple(checked_url(url) for word in words for url in word.split(",") if url)


def _prefills(groups: Sequence[Sequence[str]]) -> tuple[tuple[str, int | None], ...]:
    """Each --prefill: URLs (or lists of them), each with its bootstrap port or `none` behind it, if known."""
    found: list[tuple[str, int | None]] = []
    for group in groups:
        for word in group:
            if not word.isdecimal() and word.lower() != "none":
                found += [(url, None) for url in _urls([word])]
            elif not found or found[-1][1] is not None:
                raise ConfigError(f"--prefill {' '.join(group)}: {word} is no URL.", hint="--prefill URL [PORT]")
            elif word.isdecimal():
                if not 0 < int(word) < 1 << 16:
                    raise ConfigError(f"--prefill: {word} is no port.", hint="A port is in [1, 65535].")
                found[-1] = (found[-1][0], int(word))
    return tuple(found)


def _checked(args: RouterArgs, hints: dict[str, Any]) -> RouterArgs:
    """The arguments again, or ConfigError where one is out of its range or two contradict each other."""
    for name in hints:
        flag: Flag = typing.get_args(hints[name])[1]
        value = getattr(args, name)
        if value is not None and flag.choices and value not in flag.choices:
            legal = ", ".join(map(str, flag.choices))
            raise ConfigError(f"{option(name)} {value} is not possible.", hint=f"Choose one of: {legal}.")
        low, high = flag.low, flag.high
        if isinstance(value, (int, float)) and not (low is None or value >= low) & (high is None or value <= high):
            raise ConfigError(f"{option(name)} must be in [{low}, {'...' if high is None else high}], got {value}.")
    if args.pairs and args.worker_urls:
        raise ConfigError("--worker-urls are servers that work alone; --prefill and --decode make pairs.")
    return args
