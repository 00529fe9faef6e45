"""What is said of a cluster, with and without a terminal."""

from __future__ import annotations

import msgspec
from rich.console import Console

from moonlang.cluster import screen
from moonlang.cluster.status import GuestStatus, Status, UnitStatus

UNIT = UnitStatus(
    name="server-0",
    role="prefill",
    state="starting",
    doing="loading weights",
    share=0.25,
    pid=7,
    url="",
    requests=0,
    deaths=0,
    seconds=1,
    log="/log",
)
STATUS = Status(
    name="moonlang",
    state="starting",
    url="http://127.0.0.1:30000",
    seconds=3,
    ready_seconds=None,
    units=[UNIT],
    guests=[],
    join="moonlang up --join 10.0.0.1:1 --token secret",
    reason="",
)
READY = msgspec.structs.replace(
    STATUS,
    state="ready",
    ready_seconds=4.2,
    units=[msgspec.structs.replace(UNIT, state="ready", doing="", share=None, url="http://127.0.0.1:5")],
)


def test_events_are_what_has_changed() -> None:
    assert list(screen.events(None, STATUS)) == [
        "server-0 (prefill): loading weights 25%",
        "Cluster moonlang at http://127.0.0.1:30000 starts: 3 s",
    ]
    assert list(screen.events(STATUS, STATUS)) == []
    said = list(screen.events(STATUS, READY))
    assert said[:2] == [
        "server-0 (prefill): ready",
        "Cluster moonlang at http://127.0.0.1:30000 is ready after 4.2 s",
    ]
    assert "secret" not in "".join(said), "lines end up in other people's logs"
    guest = GuestStatus(name="server-0@b", role="decode", url="http://b:1", healthy=True, requests=0)
    more = msgspec.structs.replace(READY, guests=[guest])
    assert list(screen.events(READY, more)) == ["server-0@b (decode) of another host is there: http://b:1"]
    degraded = msgspec.structs.replace(READY, state="degraded")
    assert list(screen.events(degraded, READY)) == ["Cluster moonlang at http://127.0.0.1:30000 is ready again"]
    assert list(screen.events(more, READY)) == ["server-0@b has left"]


def test_an_end_that_nobody_has_seen_coming_says_why() -> None:
    ended = msgspec.structs.replace(STATUS, state="ended", reason="server-0 does not stay up.")
    assert any(line.endswith("is ended. server-0 does not stay up.") for line in screen.events(STATUS, ended))


def drawn(status: Status) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(screen.picture(status, hints=True))
    return console.export_text()


def test_a_picture_has_every_process_and_what_to_do() -> None:
    text = drawn(STATUS)
    assert "loading weights 25%" in text
    assert "━" in text, "a bar"
    text = drawn(READY)
    for part in ("is ready after 4.2 s", "server-0", "http://127.0.0.1:5", "curl -s", "--token secret"):
        assert part in text
