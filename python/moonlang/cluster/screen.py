"""A cluster in a terminal: a live table, or one line per event where there is no terminal."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moonlang.cluster.status import Status, UnitStatus

PROMPT = "Write a short story about a fox."
_COLOURS = {"ready": "green", "failed": "red", "waiting": "yellow", "degraded": "yellow", "draining": "cyan"}
_BAR_WIDTH = 20


class Screen(Protocol):
    """Shows a status; `close` leaves what shall stay on the terminal."""

    def show(self, status: Status) -> None: ...

    def close(self) -> None: ...


class LiveScreen:
    """A table that changes in place."""

    def __init__(self) -> None:
        self._live = Live(console=Console(), auto_refresh=False, transient=False)
        self._live.start()

    def show(self, status: Status) -> None:
        self._live.update(picture(status, hints=status.state in ("ready", "degraded")), refresh=True)

    def close(self) -> None:
        self._live.stop()


class Lines:
    """One line per event."""

    def __init__(self) -> None:
        self._last: Status | None = None

    def show(self, status: Status) -> None:
        for line in events(self._last, status):
            sys.stdout.write(f"[{status.seconds:7.1f} s] {line}\n")
        sys.stdout.flush()
        self._last = status

    def close(self) -> None:
        pass


def events(before: Status | None, now: Status) -> Iterator[str]:
    """What has happened between two looks."""
    known = {} if before is None else {unit.name: unit for unit in before.units}
    for unit in now.units:
        last = known.get(unit.name)
        if last is None or last.state != unit.state or last.role != unit.role:
            yield f"{unit.name} ({unit.role}): {_state(unit)}"
        elif unit.doing != last.doing and unit.doing:
            yield f"{unit.name} ({unit.role}): {unit.doing}"
    guests = {guest.name: guest for guest in ([] if before is None else before.guests)}
    for guest in now.guests:
        if guest.name not in guests:
            yield f"{guest.name} ({guest.role}) of another host is there: {guest.url}"
    for name in guests.keys() - {guest.name for guest in now.guests}:
        yield f"{name} has left"
    if before is None or before.state != now.state:
        again = now.state == "ready" and before is not None and before.state == "degraded"
        yield f"Cluster {now.name} at {now.url} is ready again" if again else _headline(now)
        if now.state == "ready" and (before is None or before.state == "starting"):
            yield from hints(now)


def picture(status: Status, *, hints: bool) -> RenderableType:
    """All of it, for a terminal. hints: with what to do next."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "role", "state", "requests", "deaths", "address", "process"):
        table.add_column(column, justify="right" if column in ("requests", "deaths", "process") else "left")
    for unit in status.units:
        colour = _COLOURS.get(unit.state, "default")
        state: RenderableType = Text(_state(unit), style=colour)
        if unit.share is not None and unit.state == "starting":
            state = Group(state, ProgressBar(total=1.0, completed=unit.share, width=_BAR_WIDTH))
        numbers = (str(unit.requests or ""), str(unit.deaths or ""))
        table.add_row(unit.name, unit.role, state, *numbers, unit.url, str(unit.pid or ""))
    for guest in status.guests:
        colour = "green" if guest.healthy else "yellow"
        state = Text("ready" if guest.healthy else "joining", style=colour)
        table.add_row(guest.name, guest.role, state, str(guest.requests or ""), "", guest.url, "elsewhere")
    head = Text(_headline(status), style=f"bold {_COLOURS.get(status.state, 'default')}")
    return Group(head, Text(), table, *(map(Text, ["", *_hints(status)]) if hints else ()))


def hints(status: Status) -> list[str]:
    """What to do with a cluster that is ready; without secrets."""
    body = {"model": "default", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100}
    words = ["curl", "-s", f"{status.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    name = "" if status.name == "moonlang" else f" {status.name}"
    return [
        f"Try it:      {shlex.join([*words, '-d', json.dumps(body)])}",
        f"Look at it:  moonlang status{name}; moonlang logs server-0 -f",
        f"End it:      Ctrl-C, or moonlang down{name}",
    ]


def _hints(status: Status) -> list[str]:
    return [*hints(status), *([f"Add a host:  {status.join}"] if status.join else [])]


def _headline(status: Status) -> str:
    where = f"Cluster {status.name} at {status.url}"
    match status.state:
        case "starting":
            return f"{where} starts: {status.seconds:.0f} s"
        case "ready" if status.ready_seconds is not None:
            return f"{where} is ready after {status.ready_seconds:.1f} s"
        case "stopping":
            return f"{where} ends. {status.reason}"
        case "ended":  # maybe so quickly that nobody has seen it stopping
            return f"{where} is ended. {status.reason}"
        case _:
            return f"{where} is {status.state}"


def _state(unit: UnitStatus) -> str:
    if unit.state == "starting" and unit.doing:
        return unit.doing if unit.share is None else f"{unit.doing} {unit.share:.0%}"
    if unit.state == "joining" and unit.doing:
        return unit.doing
    return {"waiting": "has died, starts again", "joining": "ready, joins", "failed": "given up"}.get(
        unit.state, unit.state
    )
