"""`sglang` is the same program under another name."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import moonlang
import sglang
from moonlang import launch_server
from moonlang.base.errors import ConfigError
from moonlang.config import alias
from moonlang.router import mini_lb


def test_same_objects():
    server_args = importlib.import_module("sglang.srt.server_args")
    assert sglang.ServerArgs is moonlang.ServerArgs is server_args.ServerArgs
    assert server_args.prepare_server_args(["--port", "1"]).port == 1
    assert importlib.import_module("sglang.launch_server").main is launch_server.main
    assert sglang.__version__ == moonlang.__version__


def test_engine():
    assert sglang.Engine is moonlang.Engine
    assert importlib.import_module("sglang.srt.entrypoints.engine").Engine is moonlang.Engine


def test_mini_lb():
    assert importlib.import_module("sglang.srt.disaggregation.mini_lb").main is mini_lb.main
    for module in ("moonlang.disaggregation.mini_lb", "sglang.srt.disaggregation.mini_lb"):
        command = [sys.executable, "-m", module, "--prefill", "http://a:1", "--worker-urls", "http://b:1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr[:29]) == (2, "Error: --worker-urls are serv")


def test_unknown_name():
    with pytest.raises(AttributeError, match="alias that MoonLang brings"):
        _ = sglang.nonsense


@pytest.mark.parametrize("module", ["moonlang", "sglang"])
def test_launch_server_refuses_before_it_loads_torch(module):
    code = (
        f"import sys, {module}.launch_server as program; status = program.main(['--attn-cp-size', '2']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "Error: --attn-cp-size 2 is not supported. This version runs one model on one device;"
    )


def test_a_real_sglang_beside_it_stops_the_launch(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.23")
    with pytest.raises(ConfigError, match="pip uninstall sglang"):
        alias.check()
    assert launch_server.main([]) == 2
    assert "SGLang 0.5.23 is installed in this environment" in capsys.readouterr().err
