"""Playing request traces: equal blocks are found in the cache, and the format is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.sim import traces
from moonlang.sim.main import main

# Two conversations over one system prompt (block 0); the second turn of each repeats its first one.
LINES = """\
{"timestamp": 0, "input_length": 1536, "output_length": 64, "hash_ids": [0, 1, 2]}
{"timestamp": 2000, "input_length": 1300, "output_length": 640, "hash_ids": [0, 3, 4]}
{"timestamp": 4000, "input_length": 2100, "output_length": 3, "hash_ids": [0, 1, 2, 5, 6]}
{"timestamp": 9000, "input_length": 1500, "output_length": 700, "hash_ids": [0, 3, 7]}
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(LINES)
    return path


def test_a_trace_plays_and_hits_what_can_be_hit(trace: Path) -> None:
    requests = traces.load(str(trace))
    outcome, report = traces.play(requests, num_pages=100)
    assert outcome.failure is None
    share = f"{(1 + 3 + 2) * traces.BLOCK / (48 + 40 + 65 + 46):.1%}"
    assert f"cache hit rate {share}" in report
    assert f"at most {share}" in report


def test_a_small_pool_hits_less(trace: Path) -> None:
    requests = traces.load(str(trace))
    roomy, tight = (float(traces.play(requests, num_pages=n)[1].split("rate ")[1].split("%")[0]) for n in (100, 6))
    assert tight < roomy


def test_the_command_plays_a_limited_number(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace-file", str(trace), "--limit", "2", "--pages", "50"]) == 0
    assert capsys.readouterr().out.startswith("2 requests")


@pytest.mark.parametrize("text", ["not json\n", '{"timestamp": 1}\n', '{"timestamp": "x"}\n'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a request trace"):
        traces.load(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        traces.load(str(tmp_path / "none.jsonl"))
