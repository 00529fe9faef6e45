"""Clusters are found by name; names and folders of dead ones are free again."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import moonlang
from moonlang.base.errors import ConfigError
from moonlang.cluster import directory
from moonlang.cluster.directory import Card
from moonlang.roles.run_directory import RunDirectory, reap


def card(name: str) -> Card:
    return Card(name=name, pid=os.getpid(), url="http://127.0.0.1:1", logs="/logs")


def test_names_are_given_one_after_the_other(temporary: Path) -> None:
    claimed = [directory.claim(None) for _ in range(3)]
    assert [name for name, _ in claimed] == ["moonlang", "moonlang-2", "moonlang-3"]
    claimed[1][1].remove()
    name, again = directory.claim(None)
    assert name == "moonlang-2"
    for folder in (claimed[0][1], claimed[2][1], again):
        folder.remove()
    assert list(temporary.iterdir()) == []


def test_a_name_that_is_taken_is_refused(temporary: Path) -> None:
    _, folder = directory.claim("chat")
    with pytest.raises(ConfigError, match="moonlang down chat"):
        directory.claim("chat")
    assert [path.name for path in temporary.iterdir()] == [f"moonlang-run-{os.getuid()}-chat"]
    folder.remove()


def test_the_name_of_a_dead_cluster_is_free(temporary: Path) -> None:
    code = "import os; from moonlang.cluster import directory; directory.claim('chat'); os._exit(1)"
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(moonlang.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert directory.running() == []
    _, folder = directory.claim("chat")
    folder.remove()


def test_a_successor_is_not_taken_for_the_dead(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the dead owner's lock and taking it, another has removed the folder and a new one is there."""
    dead = RunDirectory("chat")
    os.close(dead._lock)
    real = fcntl.flock
    new: list[RunDirectory] = []
    begun: list[bool] = []

    def late(descriptor: int, operation: int) -> None:
        if not begun:
            begun.append(True)
            reap()
            new.append(RunDirectory("chat"))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    reap()
    assert (new[0].path / "owner.lock").exists()
    new[0].remove()


def test_clusters_are_found(temporary: Path) -> None:
    with pytest.raises(ConfigError, match="moonlang up"):
        directory.find(None)
    folders = {name: directory.claim(name)[1] for name in ("a", "b")}
    directory.publish(folders["a"].path, card("a"))
    assert directory.find(None).name == "a"
    directory.publish(folders["b"].path, card("b"))
    assert [found.name for found in directory.running()] == ["a", "b"]
    assert directory.find("b").name == "b"
    with pytest.raises(ConfigError, match="a, b"):
        directory.find(None)
    with pytest.raises(ConfigError, match="a, b"):
        directory.find("c")
    assert stat.S_IMODE((folders["a"].path / "cluster.json").stat().st_mode) == 0o600
    for folder in folders.values():
        folder.remove()


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "a" * 25, "-a"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        directory.checked_name(name)
