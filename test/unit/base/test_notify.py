"""What a process tells its starter arrives, and a starter that is not there is no reason to stop."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moonlang.base import notify


def test_readiness_and_progress_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as starter:
        starter.bind(str(tmp_path / "notify"))
        starter.settimeout(60)
        monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
        notify.doing("loading weights", 0.25)
        notify.ready("http://127.0.0.1:1")
        said = [notify.fields(starter.recv(4096)) for _ in range(2)]
    assert said[0] == {"STATUS": "loading weights", notify.SHARE: "0.250"}
    assert said[1] == {"READY": "1", "STATUS": "ready", notify.URL: "http://127.0.0.1:1"}


@pytest.mark.parametrize("where", ["", "/nowhere/at/all", "@moonlang-nobody"])
def test_nobody_listens(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.VARIABLE, where)
    notify.ready()
    notify.stopping()


def test_a_starter_that_does_not_read_does_not_hold_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as starter:
        starter.bind(str(tmp_path / "notify"))
        monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
        for _ in range(2000):
            notify.doing("x" * 200)
