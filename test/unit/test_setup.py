"""scripts/setup with a stand-in for Python, apt and the network: what it does when, in fractions of a second."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Answers like a Python whose pip installs nothing.
# Files in $STATE change it: no-venv, pip-fails, pip-hangs, kernels-fail, mooncake-fails; libraries: those missing.
PYTHON = r"""#!/usr/bin/env bash
echo "python $*" >>"$STATE/calls"
case "$*" in
    *ensurepip*) [ ! -e "$STATE/no-venv" ] ;;
    *"import torch"*) exit 1 ;;
    *-VV*) echo "Python 3.11.99 (stand-in)" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    */sgl-kernel) [ ! -e "$STATE/kernels-fail" ] || { echo "ERROR: no such instruction"; exit 1; } ;;
    *mooncake-transfer-engine*) [ ! -e "$STATE/mooncake-fails" ] || { echo "ERROR: no such wheel"; exit 1; } ;;
    *missing_libraries*) cat "$STATE/libraries" 2>/dev/null || true ;;
    *--editable*)
        [ ! -e "$STATE/pip-fails" ] || { echo "ERROR: no network"; exit 1; }
        echo "Installing collected packages: a, b"
        [ ! -e "$STATE/pip-hangs" ] || { touch "$STATE/unpacking"; exec sleep 60; }
        ;;
esac
"""
APT = r"""#!/usr/bin/env bash
echo "apt $*" >>"$STATE/calls"
rm -f "$STATE/no-venv"
"""
ID = "#!/usr/bin/env bash\ncat $STATE/uid\n"


class Machine:
    """A checkout in a folder with a space, and a PATH that begins with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "a checkout"
        self.state = folder / "state"
        tools = folder / "tools"
        for made in (self.checkout / "scripts", self.checkout / "python", self.state, tools):
            made.mkdir(parents=True)
        for name in ("scripts/setup", "python/pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        for name, text in (("python3.11", PYTHON), ("apt-get", APT), ("id", ID), ("g++", "#!/bin/sh\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.set("uid", "0")
        self.command = [str(self.checkout / "scripts" / "setup")]
        self.env = {"PATH": f"{tools}:{os.environ['PATH']}", "STATE": str(self.state), "HOME": str(folder)}

    def set(self, name: str, text: str = "") -> None:
        (self.state / name).write_text(text)

    def unset(self, name: str) -> None:
        (self.state / name).unlink()

    def setup(self, purpose: str = "serve") -> subprocess.CompletedProcess[str]:
        self.set("calls")
        return subprocess.run(
            [*self.command, purpose],
            env=self.env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def calls(self) -> str:
        return (self.state / "calls").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_second_call_does_nothing(machine: Machine) -> None:
    first = machine.setup()
    assert first.returncode == 0, first.stderr
    assert "-m venv" in machine.calls
    assert f"--editable {machine.checkout}/python[client]" in machine.calls
    second = machine.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert "pip" not in machine.calls


def test_tests_need_more_than_serving_and_serving_nothing_more_than_tests(machine: Machine) -> None:
    machine.setup("serve")
    machine.setup("test")
    assert "python[client,dev]" in machine.calls
    assert "-m venv" not in machine.calls
    machine.setup("serve")
    assert "pip" not in machine.calls


@pytest.mark.parametrize("name", ["python/pyproject.toml", "constraints.txt"])
def test_new_requirements_are_installed(name: str, machine: Machine) -> None:
    machine.setup()
    with (machine.checkout / name).open("a") as file:
        file.write("\n")
    assert machine.setup().returncode == 0
    assert "--editable" in machine.calls
    assert "-m venv" not in machine.calls


def test_a_run_cut_off_while_unpacking_starts_over(machine: Machine) -> None:
    machine.set("pip-hangs")
    cut = subprocess.Popen([*machine.command, "serve"], env=machine.env, stderr=subprocess.PIPE, start_new_session=True)
    assert cut.stderr is not None
    with cut.stderr as stderr:
        assert any(b"unpacking" in line for line in stderr)
        os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    machine.unset("pip-hangs")
    again = machine.setup()
    assert again.returncode == 0
    assert "interrupted" in again.stderr
    assert "-m venv" in machine.calls


def test_a_failure_of_pip_is_shown_and_keeps_what_was_there(machine: Machine) -> None:
    machine.setup("serve")
    machine.set("pip-fails")
    failed = machine.setup("test")
    assert failed.returncode == 1
    assert "ERROR: no network" in failed.stderr
    assert machine.setup("serve").returncode == 0
    assert "pip" not in machine.calls
    machine.unset("pip-fails")
    assert machine.setup("test").returncode == 0
    assert "-m venv" not in machine.calls


def test_root_gets_the_missing_package_others_are_told(machine: Machine) -> None:
    machine.set("no-venv")
    machine.set("uid", "1000")
    told = machine.setup()
    assert told.returncode == 1
    assert "sudo apt-get install" in told.stderr
    assert not (machine.checkout / ".venv").exists()
    machine.set("uid", "0")
    assert machine.setup().returncode == 0
    assert "apt install" in machine.calls


def test_without_mooncake_the_rest_works(machine: Machine) -> None:
    machine.set("mooncake-fails")
    ready = machine.setup()
    assert ready.returncode == 0
    assert "Mooncake could not be installed" in ready.stderr
    assert "ERROR: no such wheel" in (machine.checkout / ".venv" / "mooncake.log").read_text()


def test_libraries_of_mooncake_are_installed_by_root_and_named_to_others(machine: Machine) -> None:
    machine.set("libraries", "libibverbs1 libnuma1")
    assert machine.setup().returncode == 0
    assert "libibverbs1 libnuma1" in next(line for line in machine.calls.splitlines() if "apt install" in line)
    machine.set("uid", "1000")
    told = machine.setup("test")
    assert told.returncode == 0
    assert "sudo apt-get install libibverbs1 libnuma1" in told.stderr
    assert "apt install" not in machine.calls


@pytest.fixture
def kernels(machine: Machine) -> Path:
    """The checkout of `machine` with the sources of CPU kernels."""
    folder = machine.checkout / "sgl-kernel"
    for name in ("CMakeLists.txt", "pyproject.toml", "cpp/op.cpp", "python/sgl_kernel/__init__.py", "test/test_op.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    return folder


def test_kernels_are_built_again_when_their_sources_change(machine: Machine, kernels: Path) -> None:
    assert "built the CPU kernels" in machine.setup().stderr
    assert str(kernels) in machine.calls
    for name in ("test/test_op.py", "python/sgl_kernel/_C.so"):  # what does not go into the build
        (kernels / name).write_text("2\n")
    assert machine.setup().stderr == ""
    (kernels / "cpp/op.cpp").write_text("2\n")
    assert "built the CPU kernels" in machine.setup().stderr
    assert "--editable" not in machine.calls


def test_without_kernels_the_set_up_still_ends_well(machine: Machine, kernels: Path) -> None:
    machine.set("kernels-fail")
    first = machine.setup()
    assert first.returncode == 0
    assert "MoonLang will run on torch" in first.stderr
    assert machine.setup().stderr == ""
