"""Libraries and backends in an environment that lacks some of them."""

import json
import os
import subprocess
import sys

import pytest

from moonlang.base import registry
from moonlang.base.errors import ConfigError
from moonlang.cli import library_checks
from moonlang.config import host
from moonlang.config.server_args import ServerArgs


def by_name(checks):
    return {check.name: check for check in checks}


def test_every_backend_is_named_once():
    checks = by_name(library_checks.run(ServerArgs()))
    for kind in library_checks.KINDS:
        usable = checks[kind].text.partition(": ")[2].split(", ")
        unusable = [name.partition(" ")[2] for name in checks if name.startswith(f"{kind} ")]
        assert sorted([*usable, *unusable]) == registry.names(kind)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(host, "cpu_kernels", lambda: "")
    monkeypatch.setattr(host, "has_cuda", lambda: False)
    check = by_name(library_checks.run(ServerArgs()))["sgl-kernel"]
    assert check.status == "warning"
    assert "g++" in check.fix


def test_a_backend_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    monkeypatch.delitem(sys.modules, "moonlang.attention.cpu", raising=False)
    assert "cpu" in registry.names("attention")
    assert "sgl_kernel" in registry.why_not("attention", "cpu")
    assert registry.why_not("attention", "torch_native") == ""
    with pytest.raises(ConfigError, match="no attention backend 'warp'"):
        registry.why_not("attention", "warp")


def test_a_machine_without_the_libraries_of_mooncake(tmp_path):
    """Files that are no libraries hide them from the loader, as far as this process and its children go."""
    for name in ("libibverbs.so.1", "libnuma.so.1", "libcurl.so.4"):
        (tmp_path / name).write_text("")
    command = [sys.executable, "-m", "moonlang", "doctor", "--json", "--disaggregation-mode", "prefill", "--port", "0"]
    hidden = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["libibverbs.so.1"]["fix"] == "Run `apt-get install libibverbs1`."
    assert checks["mooncake"]["status"] == "failed"
    assert "apt-get install libibverbs1 libnuma1 libcurl4" in checks["mooncake"]["fix"]
    assert checks["disaggregation mooncake"]["status"] == "warning"
    assert "local" in checks["disaggregation"]["text"]
    assert checks["model"]["status"] == "ok"
