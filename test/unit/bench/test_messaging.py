"""The bench of messages runs over real processes, says what it measured, and refuses what it does not know."""

import json

import pytest

from moonlang.base.errors import ConfigError
from moonlang.bench import command


def test_all_backends_of_one_host_side_by_side(capsys, tmp_path):
    out = tmp_path / "out.json"
    words = [
        "messaging",
        "--rounds",
        "1",
        "--scale",
        "0.02",
        "--backends",
        "pyzmq,zmq,mooncake,inproc",
        "--out",
        str(out),
    ]
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["pyzmq", "zmq", "mooncake", "inproc"]
    assert len(lines) == 1 + 4 * 3
    found = json.loads(out.read_text())
    assert found["machine"]["date"]
    assert found["machine"]["versions"]["pyzmq"]
    assert found["medians"]["mooncake"]["200"]["trip_ratio"] > 0
    assert "trip_ratio" not in found["medians"]["pyzmq"]["200"]
    rounds = found["rounds"]
    assert all(row["p50_us"] > 0 and row["per_second"] > 0 for row in rounds["mooncake"]["200"])


@pytest.mark.parametrize("words", [[], ["weather"], ["messaging", "--backends", "pigeons"]])
def test_what_it_does_not_know(words):
    with pytest.raises(ConfigError):
        command.main(words)
