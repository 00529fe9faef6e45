"""Stops are found when complete, wherever the text is cut; nothing of them is shown; the rest of the text is."""

from __future__ import annotations

import random
import re

import pytest

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import RequestError
from moonlang.text.stop import REGEX_WINDOW_CHARS, Hit, StopMatcher


def run(matcher: StopMatcher, parts: list[str]) -> tuple[str, str | None]:
    """All text that is shown, and what matched."""
    shown = ""
    for part in parts:
        found = matcher.push(part)
        if isinstance(found, Hit):
            return shown + found.text, found.matched
        shown += found
    return shown + matcher.finish(), None


def oracle(text: str, strings: tuple[str, ...], trim: bool) -> tuple[str, str | None]:
    """The first prefix that holds a stop decides; in it the earliest position, then the order of the request."""
    for end in range(len(text) + 1):
        found = [(text[:end].find(string), index) for index, string in enumerate(strings) if string in text[:end]]
        if found:
            start, index = min(found)
            return (text[:start] if trim else text[: start + len(strings[index])]), strings[index]
    return text, None


@pytest.mark.parametrize("seed", range(200))
def test_against_the_oracle_character_by_character(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    strings = tuple("".join(rng.choice("ab") for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(1, 3)))
    trim = rng.random() < 0.5
    assert run(StopMatcher(strings, trim=trim), list(text)) == oracle(text, strings, trim)


@pytest.mark.parametrize("seed", range(100))
def test_what_is_shown_never_has_to_be_taken_back(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abc") for _ in range(80))
    stop = "".join(rng.choice("abc") for _ in range(5))
    matcher, shown, at = StopMatcher((stop,)), "", 0
    expected = text.split(stop)[0]
    while at < len(text):
        size = rng.randint(1, 6)
        found = matcher.push(text[at : at + size])
        at += size
        shown += found.text if isinstance(found, Hit) else found
        assert expected.startswith(shown)
        if isinstance(found, Hit):
            break
    else:
        shown += matcher.finish()
    assert shown == expected


def test_a_stop_over_several_pieces() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert matcher.push("Hi.\n") == "Hi."
    assert matcher.push("\nUs") == ""
    assert matcher.push("er: more") == Hit(text="", matched="\n\nUser:")


def test_a_false_alarm_is_shown_as_soon_as_it_is_one() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("a ST") == "a "
    assert matcher.push("A") == "STA"
    assert matcher.push("S") == ""
    assert matcher.finish() == "S"


def test_the_earliest_position_wins() -> None:
    assert run(StopMatcher(("world", "hello")), ["say hello world"]) == ("say ", "hello")


def test_no_trim_keeps_the_stop_and_drops_what_follows() -> None:
    assert run(StopMatcher(("END",), trim=False), ["a END b"]) == ("a END", "END")


def test_an_empty_stop_never_matches() -> None:
    assert run(StopMatcher(("",), ("",)), ["abc"]) == ("abc", None)


def test_memory_does_not_grow_with_the_text() -> None:
    for matcher in (StopMatcher(("STOP",)), StopMatcher((), ("S.OP",))):
        for _ in range(1000):
            matcher.push("some text ")
        assert len(matcher._text) <= 4 * REGEX_WINDOW_CHARS


# ---- expressions


def test_an_expression_is_found_across_pieces() -> None:
    matcher = StopMatcher((), (r"\d{3}-\d{4}",))
    assert matcher.push("call 55") == "call "
    assert matcher.push("5-12") == ""
    assert matcher.push("34 now") == Hit(text="", matched=r"\d{3}-\d{4}")


def test_an_expression_that_did_not_match_is_shown() -> None:
    assert run(StopMatcher((), (r"\d{3}-\d{4}",)), ["call 55", "5-x"]) == ("call 555-x", None)


def test_strings_and_expressions_compete_by_position() -> None:
    assert run(StopMatcher(("zz",), ("b+",)), ["aabbzz"]) == ("aa", "b+")
    assert run(StopMatcher(("aa",), ("b+",)), ["xaabb"]) == ("x", "aa")


def test_an_anchor_matches_the_beginning_of_the_output_only() -> None:
    matcher = StopMatcher((), ("^x",))
    text = "y" + "ax" * 3000
    assert run(matcher, [text[at : at + 7] for at in range(0, len(text), 7)]) == (text, None)
    assert run(StopMatcher((), ("^x",)), ["xy"]) == ("", "^x")


@pytest.mark.parametrize("seed", range(100))
def test_expressions_against_re(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abc1") for _ in range(50))
    pattern = rng.choice(["a+b", "[bc]{3}", "1(?=a)", "c.1", "(ab|ba)c", "b1|cc"])
    expected = next((m for end in range(len(text) + 1) if (m := re.search(pattern, text[:end]))), None)
    shown, matched = run(StopMatcher((), (pattern,)), list(text))
    assert (shown, matched) == ((text, None) if expected is None else (text[: expected.start()], pattern))


def test_a_catastrophic_expression_is_refused_in_time() -> None:
    matcher = StopMatcher((), (r"(a|a|b?)*(x+x+)+y",))
    before = monotonic_ns()
    with pytest.raises(RequestError, match="too long"):
        matcher.push("a" * 30 + "x" * 3000)
    assert monotonic_ns() - before < NS_PER_S


def test_a_broken_expression_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="not a regular expression"):
        StopMatcher((), ("(",))
