"""Values as people write them on a command line."""

import argparse

import pytest

from moonlang.config import flag


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-1", -1), ("32k", 32_000), ("32K", 32_000), ("32Ki", 32_768), ("1M", 1_000_000), ("1.5k", 1500),
     ("2Gi", 2 << 30), ("1_000", 1000), (" 7 ", 7)],
)  # fmt: skip
def test_integers(text, value):
    assert flag.parse_int(text) == value


@pytest.mark.parametrize("text", ["", "x", "1i", "1.5", "1.0001k", "1kk", "0x10", "--1"])
def test_bad_integers(text):
    with pytest.raises(argparse.ArgumentTypeError):
        flag.parse_int(text)


def test_json_and_bool():
    assert flag.parse_json('{"a": [1]}') == {"a": [1]}
    assert (flag.parse_bool("True"), flag.parse_bool("0")) == (True, False)
    for parser, text in ((flag.parse_json, "{a}"), (flag.parse_bool, "maybe"), (flag.parse_float, "1,5")):
        with pytest.raises(argparse.ArgumentTypeError):
            parser(text)
