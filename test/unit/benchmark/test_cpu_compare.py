"""What benchmark/cpu makes of its measurements, and that a failure stays with the engine that failed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import engines
import pytest
from cpu.cases import CASES, Case, Demand
from cpu.compare import Engine, Group, Peer, groups
from cpu.noise import Neighbours
from cpu.table import rows
from load import Load

WORK = Load(requests=1, concurrency=1, input_len=1, output_len=1)
CASE = Case("T", WORK, {"tpot_p50_ms": Demand(2.0, at_most=12), "tokens_per_s": Demand(1.5)})


def engine(name: str, tpot: list[float], noise: list[float]) -> Engine:
    found = [{"tpot_p50_ms": t, "tokens_per_s": 1000 / t, "noise": n} for t, n in zip(tpot, noise, strict=True)]
    return Engine(name, start_s=[3.0, 1.0, 2.0], beyond_mb=100.0, figures={"case": found})


def test_medians_of_quiet_rounds_and_what_must_hold() -> None:
    ours = engine("moonlang", [10, 99, 10], [0.01, 0.5, 0.02])
    vllm = engine("vllm", [19, 21, 500], [0.0, 0.04, 0.9])
    tpot, rate, start, beyond = rows("T", {"case": CASE}, [ours, vllm])
    assert tpot["medians"] == {"moonlang": 10, "vllm": 20}
    assert tpot["ratios"] == {"vllm": 2.0}
    assert tpot["verdict"] == "reached at most 12, reached 2x vllm"
    assert tpot["quiet_rounds"] == {"moonlang": "2/3", "vllm": "2/3"}
    assert rate["ratios"]["vllm"] == pytest.approx(2, rel=0.01)
    assert (start["medians"]["moonlang"], beyond["medians"]["moonlang"]) == (2.0, 100.0)


def test_noisy_rounds_count_when_there_is_no_better_one() -> None:
    (tpot, *_) = rows("T", {"case": CASE}, [engine("moonlang", [10, 30], [0.5, 0.6])])
    assert (tpot["medians"], tpot["ratios"], tpot["verdict"]) == ({"moonlang": 20}, {}, "MISSED at most 12")


def test_a_variant_is_compared_with_moonlang_itself() -> None:
    case = Case("M", WORK, {"tpot_p50_ms": Demand()}, {"int8": "--quantization int8"})
    found = [engine("moonlang", [30], [0]), engine("int8", [15], [0])]
    (row,) = rows("M", {"case": case}, found)
    assert (row["ratios"], row["verdict"]) == ({"int8": 2.0}, "reached 1.6x int8")


def test_an_engine_that_failed_has_no_figures() -> None:
    (tpot, *_) = rows("T", {"case": CASE}, [Engine("moonlang"), engine("vllm", [1], [0])])
    assert (tpot["medians"], tpot["verdict"]) == ({"vllm": 1}, "not measured")


def test_peers_name_their_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random_checkpoints.make", lambda name, folder: folder / name)
    peers = [Peer.parse("vllm=serve {model}"), Peer.parse("llama@E,S=other --a=b")]
    found = {group.shape: list(group.engines) for group in groups(["E-single", "T1"], "own", peers, tmp_path)}
    assert found == {"E": ["moonlang", "vllm", "llama"], "T": ["moonlang", "vllm"]}
    (own,) = groups(["M-quantized"], "own", peers, tmp_path)
    assert list(own.engines) == ["moonlang", *CASES["M-quantized"].options]
    assert peers[1].command == "other --a=b"


def test_a_server_that_does_not_start_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random_checkpoints.make", lambda name, folder: folder / name)
    with Group("T", ["T1"], {"moonlang": f"{sys.executable} -c 1", "vllm": "/no/such/command"}, tmp_path) as group:
        group.round(0)
    assert all("start" in one.failures and not one.figures for one in group.engines.values())


def await_stopped(server: engines.Server, stopped: bool) -> None:
    """A signal arrives when the system gets round to it."""
    deadline = time.monotonic() + 60
    while (server.tree()[0].status() == "stopped") != stopped:
        assert time.monotonic() < deadline


def test_a_paused_server_stands_still(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(
        "import http.server, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    watch = Neighbours()
    with engines.serving(f"{sys.executable} {program} {{port}}", tmp_path, tmp_path / "log") as server:
        server.pause()
        await_stopped(server, True)
        server.resume()
        await_stopped(server, False)
        assert server.memory_mb() > 1
    assert server.tree() == []
    assert 0 <= watch.share() <= 1
