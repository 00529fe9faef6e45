"""Where the library comes from, and what is said where it is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.mooncake import lib

PACKAGE = Path(lib.__file__).parents[1]


def test_only_lib_imports_the_vendor_package() -> None:
    """And lib does it by name, at first use."""
    vendor = re.compile(r"^\s*(import|from) mooncake\b", re.MULTILINE)
    assert [file for file in PACKAGE.rglob("*.py") if vendor.search(file.read_text())] == []
    by_name = [file for file in PACKAGE.rglob("*.py") if '"mooncake.' in file.read_text()]
    assert by_name == [Path(lib.__file__)]


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    monkeypatch.setattr(lib, "version", lambda: "")
    with pytest.raises(ConfigError, match="cannot be loaded") as missing:
        lib.transfer_engine()
    assert "moonlang[cpu]" in missing.value.hint
    assert "mooncake-transfer-engine-cuda13" in missing.value.hint


def test_without_a_system_library_the_error_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    monkeypatch.setattr(lib, "version", lambda: "mooncake 1")
    monkeypatch.setattr(lib, "SYSTEM_LIBRARIES", {"libnothing.so.9": "libnothing9"})
    with pytest.raises(ConfigError) as missing:
        lib.transfer_engine()
    assert missing.value.hint == "Run `apt-get install libnothing9`."


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    monkeypatch.setenv("MC_TCP_STATUS_TIMEOUT_SEC", "7")
    for name in lib.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
    monkeypatch.delenv("MC_LOG_LEVEL")
    monkeypatch.setenv("MC_LOG_DIR", "/tmp")
    with pytest.raises(ConfigError):
        lib.transfer_engine()
    assert os.environ["MC_TCP_STATUS_TIMEOUT_SEC"] == "7"
    assert os.environ["MC_LOG_LEVEL"] == "ERROR"
    assert "MC_LOG_DIR" not in os.environ


@pytest.mark.skipif(bool(lib.how_to_get()), reason=f"Mooncake is not there: {lib.how_to_get()}")
def test_a_log_folder_does_not_abort_the_process(tmp_path: Path) -> None:
    code = "from moonlang.mooncake import lib; lib.transfer_engine(); print('alive')"
    environ = {**os.environ, "MC_LOG_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert child.stdout.strip() == "alive", child.stderr
