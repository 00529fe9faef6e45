"""Logs keep their last lines and do not grow without end."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moonlang.cluster import log_file
from moonlang.cluster.log_file import LogFile


def test_last_lines_are_whole_lines(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    for chunk in (b"one\ntw", b"o\nthr", b"ee"):
        log.write(chunk)
    assert list(log.lines) == ["one", "two"]
    log.end()
    assert list(log.lines) == ["one", "two", "three"]
    log.close()
    assert log.path.read_bytes() == b"one\ntwo\nthree\n"
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_it_begins_anew_when_it_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 100)
    log = LogFile(tmp_path / "a.log")
    for number in range(100):
        log.write(f"line {number:03}\n".encode())
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    assert all(path.stat().st_size <= 110 for path in tmp_path.iterdir())
    assert list(log.lines)[-1] == "line 099"
