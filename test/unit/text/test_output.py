"""Pieces of output: when they are due, what is in them, and how stops cut tokens, text and logprobs alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from moonlang.core.messages import StreamHead, TextDelta, TokenDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.core.sampling import SamplingParams
from moonlang.text.output import Output

EOS = 0


@dataclass
class Letters:
    """Token n is the n-th letter; EOS is a token with text, too."""

    pushed: list[int] = field(default_factory=list)

    def push(self, tokens) -> str:
        self.pushed += tokens
        return "".join("$" if token == EOS else chr(ord("a") + token - 1) for token in tokens)

    def finish(self) -> str:
        return ""


def ids(text: str) -> tuple[int, ...]:
    return tuple(ord(letter) - ord("a") + 1 for letter in text)


def output(interval: int | None = 1, **sampling) -> Output:
    head = StreamHead(3, 0, interval is not None, SamplingParams(**sampling))
    return Output("r", head, Letters(), interval)


def feed(out: Output, text: str, finish: Finish | None = None, per_delta: int = 1) -> list[TextDelta]:
    """Push `text` in deltas of some tokens, the finish with the last."""
    tokens = ids(text)
    pieces = []
    for at in range(0, len(tokens), per_delta):
        last = at + per_delta >= len(tokens)
        logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens[at : at + per_delta])
        piece = out.push(TokenDelta("r", tokens[at : at + per_delta], finish if last else None, output=logprobs))
        if piece is not None:
            pieces.append(piece)
            if piece.finish is not None:
                break
    return pieces


LENGTH = Finish(kind="length", length=3)


def test_a_stream_gets_a_piece_per_delta_and_the_head_once() -> None:
    pieces = feed(output(), "abc", LENGTH)
    assert [piece.text for piece in pieces] == ["a", "b", "c"]
    assert [piece.tokens for piece in pieces] == [(1,), (2,), (3,)]
    assert [piece.head is not None for piece in pieces] == [True, False, False]
    assert [piece.finish for piece in pieces] == [None, None, LENGTH]


def test_the_first_piece_comes_at_once_the_others_at_the_interval() -> None:
    assert [piece.text for piece in feed(output(interval=3), "abcdefgh", LENGTH)] == ["a", "bcd", "efg", "h"]


def test_without_streaming_everything_comes_with_the_finish() -> None:
    for per_delta in (1, 2, 5):
        (piece,) = feed(output(interval=None), "abcde", LENGTH, per_delta)
        assert (piece.text, piece.tokens, piece.finish) == ("abcde", ids("abcde"), LENGTH)
        assert len(piece.output) == 5


def test_prompt_logprobs_and_retractions_are_handed_on() -> None:
    out = output(interval=None)
    prompt = (TokenLogprob(9, None), TokenLogprob(8, -2.0))
    assert out.push(TokenDelta("r", (), prompt=prompt[:1])) is None
    piece = out.push(TokenDelta("r", (1,), LENGTH, prompt=prompt[1:], retractions=2))
    assert piece is not None
    assert (piece.prompt, piece.retractions) == (prompt, 2)


def test_many_log_probabilities_are_not_saved_up_for_one_huge_message() -> None:
    out = output(interval=None)
    entry = TokenLogprob(1, -1.0, tuple((-1.0, token) for token in range(1000)))
    pieces = [out.push(TokenDelta("r", (), head=None, prompt=(entry,) * 100)) for _ in range(5)]
    assert [piece is not None for piece in pieces] == [False, True, False, True, False]
    assert sum(len(piece.prompt) for piece in pieces if piece) == 400
    last = out.push(TokenDelta("r", (1,), LENGTH))
    assert last is not None
    assert (len(last.prompt), last.text) == (100, "a")


STOPPED = Finish(kind="stop", matched=EOS)


def test_the_stop_token_is_reported_but_not_shown() -> None:
    for interval in (1, None):
        out = output(interval)
        out.push(TokenDelta("r", ids("ab")))
        piece = out.push(TokenDelta("r", (3, EOS), STOPPED))
        assert piece is not None
        assert piece.text == ("c" if interval else "abc")
        assert piece.tokens[-1] == EOS


def test_no_stop_trim_shows_it() -> None:
    piece = output(no_stop_trim=True).push(TokenDelta("r", (1, EOS), STOPPED))
    assert piece is not None
    assert piece.text == "a$"


def test_a_stop_string_ends_the_output_at_the_token_that_completes_it() -> None:
    for interval in (1, 4, None):
        for per_delta in (1, 3, 10):
            pieces = feed(output(interval, stop=("def",)), "abcdefgh", LENGTH, per_delta)
            assert "".join(piece.text for piece in pieces) == "abc"
            assert sum((piece.tokens for piece in pieces), ()) == ids("abcdef")
            assert sum(len(piece.output) for piece in pieces) == 6
            assert pieces[-1].finish == Finish(kind="stop", matched="def")


def test_a_stop_string_with_no_stop_trim() -> None:
    pieces = feed(output(stop=("def",), no_stop_trim=True), "abcdefgh", LENGTH)
    assert "".join(piece.text for piece in pieces) == "abcdef"


def test_a_stop_expression() -> None:
    pieces = feed(output(stop_regex=("[xd]e",)), "abcdefgh", LENGTH)
    assert "".join(piece.text for piece in pieces) == "abc"
    assert pieces[-1].finish == Finish(kind="stop", matched="[xd]e")


def test_half_a_stop_string_at_the_end_is_text() -> None:
    pieces = feed(output(stop=("cdx",)), "abcd", LENGTH)
    assert [piece.text for piece in pieces] == ["a", "b", "", "cd"]


def test_a_stop_string_before_the_stop_token_wins() -> None:
    piece = output(None, stop=("b",)).push(TokenDelta("r", (1, 2, EOS), STOPPED))
    assert piece is not None
    assert (piece.text, piece.tokens, piece.finish) == ("a", (1, 2), Finish(kind="stop", matched="b"))


def test_the_text_of_the_stop_token_is_not_searched() -> None:
    piece = output(None, stop=("$",)).push(TokenDelta("r", (1, EOS), STOPPED))
    assert piece is not None
    assert (piece.text, piece.finish) == ("a", STOPPED)


def test_an_abort_ends_the_output_with_what_there_is() -> None:
    abort = Finish(kind="abort", message="gone", status=499)
    out = output(None)
    out.push(TokenDelta("r", ids("ab")))
    piece = out.push(TokenDelta("r", (), abort))
    assert piece is not None
    assert (piece.text, piece.finish) == ("ab", abort)


def test_an_expression_that_takes_too_long_aborts_the_request() -> None:
    head = StreamHead(3, 0, True, SamplingParams(stop_regex=(r"(a|a|b?)*(x+x+)+y",)))

    class Long(Letters):
        def push(self, tokens) -> str:
            return "a" * 30 + "x" * 3000

    piece = Output("r", head, Long(), 1).push(TokenDelta("r", (1,)))
    assert piece is not None
    assert piece.finish is not None
    assert (piece.finish.kind, piece.finish.status) == ("abort", 400)


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    head = StreamHead(3, 0, True, SamplingParams(stop=("x",)))
    piece = Output("r", head, None, 1).push(TokenDelta("r", (1, 2), LENGTH))
    assert piece is not None
    assert (piece.text, piece.tokens, piece.finish) == ("", (1, 2), LENGTH)


def test_another_scheduler_goes_on_and_what_it_repeats_is_not_said_twice() -> None:
    """The client has heard of two tokens of four: the successor says the other two again."""
    out = output(interval=2, stop=("xyz",))
    told = feed(out, "abcd")
    assert [piece.tokens for piece in told] == [(1,), (2, 3)]
    out.resume(StreamHead(3, 0, True, SamplingParams(), again=1, said=2), "scheduler-1")
    more = feed(out, "cdefg", LENGTH, per_delta=3)
    assert [piece.tokens for piece in (*told, *more)] == [(1,), (2, 3), (4, 5), (6, 7)]
    assert [len(piece.output) for piece in more] == [2, 2]
    assert "".join(piece.text for piece in (*told, *more)) == "abcdefg"
    assert more[-1].finish == LENGTH


def test_log_probabilities_of_the_prompt_are_not_said_twice() -> None:
    out = output(interval=1)
    entries = tuple(TokenLogprob(token, -1.0) for token in range(3))
    assert out.push(TokenDelta("r", (), prompt=entries[:2])) is None
    out.resume(StreamHead(3, 0, True, SamplingParams(), again=1), "scheduler-1")
    assert out.push(TokenDelta("r", (), prompt=entries[:1])) is None
    piece = out.push(TokenDelta("r", (1,), prompt=entries[1:]))
    assert piece is not None
    assert piece.prompt == entries
