"""Starting, watching and stopping roles, with the cheap role alone: no torch, well under a second each."""

from __future__ import annotations

import os
import select
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_folder import write_tiny_folder

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError, PeerError
from moonlang.config.model_config import ModelConfig, load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.roles import topology
from moonlang.roles.supervisor import Cluster, launch

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def only_the_detokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "CHILDREN", (topology.DETOKENIZER,))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "model")


def arguments(folder: Path, *, in_process: bool = False, **more) -> tuple[ServerArgs, ModelConfig]:
    messages = "inproc" if in_process else "mooncake"
    args = ServerArgs.create(
        model_path=str(folder), load_format="dummy", in_process=in_process, messaging_backend=messages, **more
    )
    return args, load_model_config(str(folder), args)


class Deaths:
    """Collects what `on_death` reports."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.found: list[tuple[str, int, tuple[str, ...]]] = []

    def __call__(self, name: str, status: int, lines: tuple[str, ...]) -> None:
        self.found.append((name, status, lines))
        self.event.set()


@pytest.fixture
def cluster(model_folder: Path, temporary: Path) -> Iterator[Cluster]:
    cluster = launch(*arguments(model_folder))
    yield cluster
    cluster.close()


def pid_of(cluster: Cluster) -> int:
    return cluster.ready["detokenizer"]["pid"]


def wait_gone(pid: int) -> None:
    """Wait for the end of a process that is not (or no longer) ours to wait for."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], DEADLINE_S)[0], f"process {pid} still lives"
    finally:
        os.close(pidfd)


def test_a_role_runs_in_a_process_of_its_own_and_leaves_nothing(cluster: Cluster, temporary: Path) -> None:
    pid = pid_of(cluster)
    assert pid != os.getpid()
    assert Path(f"/proc/{pid}/comm").read_text().strip() == "moonlang::detok"
    (directory,) = temporary.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not [module for module in ("torch", "transformers") if module in Path(f"/proc/{pid}/maps").read_text()]
    cluster.close()
    cluster.close()
    wait_gone(pid)
    assert list(temporary.iterdir()) == []


def test_a_killed_role_is_reported_at_once(cluster: Cluster) -> None:
    deaths = Deaths()
    cluster.on_death(deaths)
    before = monotonic_ns()
    os.kill(pid_of(cluster), signal.SIGKILL)
    assert deaths.event.wait(DEADLINE_S)
    assert monotonic_ns() - before < 30 * NS_PER_S  # not by --watchdog-timeout
    assert [(name, status) for name, status, _ in deaths.found] == [("detokenizer", -signal.SIGKILL)]


def test_a_death_before_anybody_listens_is_reported_later(cluster: Cluster) -> None:
    first = Deaths()
    cluster.on_death(first)
    os.kill(pid_of(cluster), signal.SIGKILL)
    assert first.event.wait(DEADLINE_S)
    late = Deaths()
    cluster.on_death(late)
    assert late.found == first.found


def test_a_signal_before_any_role_runs_leaves_nothing(
    model_folder: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(topology, "children", interrupted)
    with pytest.raises(SystemExit):
        Cluster(*arguments(model_folder))
    assert not list(temporary.iterdir())


def test_closing_is_no_death(cluster: Cluster) -> None:
    deaths = Deaths()
    cluster.on_death(deaths)
    cluster.close()
    assert deaths.found == []


def test_a_role_that_stands_still_is_killed(
    model_folder: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = launch(*arguments(model_folder, watchdog_timeout=1))
    deaths = Deaths()
    cluster.on_death(deaths)
    os.kill(pid_of(cluster), signal.SIGSTOP)
    assert deaths.event.wait(DEADLINE_S)
    assert deaths.found == [("detokenizer", -signal.SIGKILL, ())]
    assert "The detokenizer has not answered for 1 s (--watchdog-timeout)." in caplog.text
    cluster.close()


def test_an_idle_role_is_not_hung(model_folder: Path, temporary: Path) -> None:
    cluster = launch(*arguments(model_folder, watchdog_timeout=2))
    deaths = Deaths()
    cluster.on_death(deaths)
    assert not deaths.event.wait(3)
    cluster.close()


@pytest.mark.parametrize("in_process", [False, True])
def test_a_config_error_of_a_child_comes_with_its_own_words(
    model_folder: Path, temporary: Path, in_process: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        launch(*arguments(model_folder, in_process=in_process))
    assert list(temporary.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("in_process", [False, True])
def test_a_child_that_breaks_is_reported_with_its_last_lines(
    model_folder: Path, temporary: Path, in_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "CHILDREN", ("no such role",))
    monkeypatch.setattr(topology, "ROLES", ("api", "no such role"))
    with pytest.raises(PeerError, match="no such role") as error:
        launch(*arguments(model_folder, in_process=in_process))
    assert "BugError: There is no role 'no such role'." in error.value.message
    assert list(temporary.iterdir()) == []


def test_threads_take_the_place_of_processes(model_folder: Path, temporary: Path) -> None:
    cluster = launch(*arguments(model_folder, in_process=True))
    assert pid_of(cluster) == os.getpid()
    names = [thread.name for thread in threading.enumerate()]
    assert "moonlang::detokenizer" in names
    cluster.close()
    assert "moonlang::detokenizer" not in [thread.name for thread in threading.enumerate()]
    assert list(temporary.iterdir()) == []


def test_two_clusters_at_once(model_folder: Path, temporary: Path) -> None:
    clusters = [launch(*arguments(model_folder)) for _ in range(2)]
    assert len({pid_of(cluster) for cluster in clusters}) == 2
    for cluster in clusters:
        cluster.close()
    assert list(temporary.iterdir()) == []


def test_a_launch_from_a_thread_that_ends_keeps_its_children(model_folder: Path, temporary: Path) -> None:
    """The kernel's parent-death signal belongs to the thread that forked."""
    found: list[Cluster] = []
    starter = threading.Thread(target=lambda: found.append(launch(*arguments(model_folder))))
    starter.start()
    starter.join()
    deaths = Deaths()
    found[0].on_death(deaths)
    assert not deaths.event.wait(0.3)
    found[0].close()
