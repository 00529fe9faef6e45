"""The clusters of this user on this host, as folders: who they are, their control sockets, their logs."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from moonlang.base.errors import ConfigError
from moonlang.roles import run_directory
from moonlang.roles.run_directory import LONGEST_NAME, RunDirectory

DEFAULT_NAME = "moonlang"
MOST_CLUSTERS = 64  # of one user and name on one host
_CARD = "cluster.json"
_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{LONGEST_NAME - 1}}}")


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What a running cluster says of itself to commands of the same user. url: its public address."""

    name: str
    pid: int
    url: str
    logs: str


def checked_name(name: str) -> str:
    """ConfigError when a cluster cannot have this name."""
    if not _NAME.fullmatch(name):
        hint = f"Use at most {LONGEST_NAME} of a-z, 0-9 and -, like --name chat."
        raise ConfigError(f"--name {name!r} is not possible.", hint=hint)
    return name


def claim(name: str | None, default: str = DEFAULT_NAME) -> tuple[str, RunDirectory]:
    """The folder of a new cluster. Without a name: `default`, or the next free one after it. ConfigError if taken."""
    if name is not None:
        try:
            return name, RunDirectory(checked_name(name))
        except FileExistsError:
            hint = f"Choose another --name, or end it with `moonlang down {name}`."
            raise ConfigError(f"There is a cluster {name} already.", hint=hint) from None
    for number in range(1, MOST_CLUSTERS + 1):
        tried = default if number == 1 else f"{default[: LONGEST_NAME - 3]}-{number}"
        try:
            return tried, RunDirectory(tried)
        except FileExistsError:
            continue
    raise ConfigError(f"There are {MOST_CLUSTERS} clusters already.", hint="End some with `moonlang down NAME`.")


def publish(folder: Path, card: Card) -> None:
    """Let other commands find the cluster."""
    write(folder / _CARD, msgspec.json.encode(card))


def write(path: Path, content: bytes) -> None:
    """All at once, and for this user's eyes only: cards hold tokens and addresses."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_bytes(content)
    new.replace(path)


def running() -> list[Card]:
    """This user's clusters on this host."""
    run_directory.reap()
    found = [_card(path) for path in sorted(run_directory.named("x").parent.glob(f"{run_directory.named('').name}*"))]
    return [card for card in found if card is not None]


def find(name: str | None) -> Card:
    """The cluster of that name, or without a name the only one. ConfigError otherwise."""
    cards = running()
    if name is None and len(cards) == 1:
        return cards[0]
    names = ", ".join(card.name for card in cards)
    if not cards:
        raise ConfigError("No cluster of yours runs on this host.", hint="Start one with `moonlang up`.")
    if name is None:
        raise ConfigError("Several clusters run on this host.", hint=f"Name one of: {names}.")
    for card in cards:
        if card.name == name:
            return card
    raise ConfigError(f"There is no cluster {name}.", hint=f"There are: {names}.")


def folder(name: str) -> Path:
    return run_directory.named(name)


def _card(path: Path) -> Card | None:
    try:
        return msgspec.json.decode((path / _CARD).read_bytes(), type=Card)
    except (OSError, msgspec.DecodeError):
        return None  # it is about to come, or to go
