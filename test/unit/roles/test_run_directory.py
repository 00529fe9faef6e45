"""Run directories: private, short enough for sockets, and never left behind for good."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import moonlang
from moonlang.roles import topology
from moonlang.roles.run_directory import RunDirectory

LONGEST_SOCKET_PATH = 107


def test_private_and_gone_after_remove(temporary: Path) -> None:
    directory = RunDirectory()
    assert directory.path.parent == temporary
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.remove()
    directory.remove()
    assert list(temporary.iterdir()) == []


def test_a_living_server_keeps_its_folder(temporary: Path) -> None:
    first, second = RunDirectory(), RunDirectory()
    assert first.path.exists()
    first.remove()
    second.remove()


def test_the_folder_of_a_dead_server_is_removed_by_the_next(temporary: Path) -> None:
    code = "import os; from moonlang.roles.run_directory import RunDirectory; RunDirectory(); os._exit(1)"
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(moonlang.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    (stale,) = temporary.iterdir()
    (segment := Path(f"/dev/shm/{stale.name}-ranks")).touch()
    (inside := Path("/dev/shm/moonlang-run-inside-ranks-1")).touch()
    (stale / "moonlang-run-inside").mkdir()
    directory = RunDirectory()
    assert not any(one.exists() for one in (stale, segment, inside))
    directory.remove()


def test_what_ranks_have_left_in_shared_memory_goes_with_the_folder(temporary: Path) -> None:
    """When they were killed before they had all met."""
    ended, living = RunDirectory(), RunDirectory()
    left, kept = (Path(f"/dev/shm/{one.path.name}-ranks") for one in (ended, living))
    for segment in (left, kept):
        segment.touch()
    ended.remove()
    assert not left.exists()
    assert kept.exists()
    living.remove()
    assert not kept.exists()


def test_folders_of_others_are_left_alone(temporary: Path) -> None:
    other = temporary / "moonlang-run-other"
    other.mkdir()
    RunDirectory().remove()
    assert other.exists()


def test_a_long_temporary_folder_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    directory = RunDirectory()
    for address in topology.addresses(directory.path).values():
        assert len(address.removeprefix("ipc://")) <= LONGEST_SOCKET_PATH
    directory.remove()
