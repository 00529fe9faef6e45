"""The detokenizer role between two mailboxes: batches, stops, and nothing kept of what has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_folder import write_tiny_folder

from moonlang.base.errors import PeerError
from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Message, StopHit, StreamHead, TextBatch, TextDelta, TokenBatch, TokenDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.core.sampling import SamplingParams
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.roles import topology
from moonlang.roles.detokenizer import DetokenizerRole
from moonlang.roles.role import NEVER_NS
from moonlang.text.tokenizer import FastTokenizer

LENGTH = Finish(kind="length", length=9)


class Bench:
    """The role with its neighbours' mailboxes."""

    def __init__(self, folder: Path, **more) -> None:
        args = ServerArgs.create(model_path=str(folder), **more)
        hub = Hub(topology.ROLES)
        self.hub = hub
        self.scheduler = InprocEndpoint(topology.SCHEDULER, hub)
        self.api = InprocEndpoint(topology.API, hub)
        self.role = DetokenizerRole(args, load_model_config(str(folder), args), InprocEndpoint("detokenizer", hub))
        self.tokenizer = FastTokenizer(folder)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def feed(self, *deltas: TokenDelta) -> list[TextDelta]:
        """One batch in; the texts of the batches that come out."""
        self.scheduler.send("detokenizer", TokenBatch(deltas))
        assert self.role.step(0) == NEVER_NS
        return [delta for body in self.sent(self.api) for delta in body.items if isinstance(body, TextBatch)]

    def sent(self, endpoint: InprocEndpoint) -> list[Message]:
        return [envelope.body for envelope in endpoint.recv()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "model")


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder)
    yield bench
    bench.role.close()
    bench.hub.close()


def head(stream: bool = True, **sampling) -> StreamHead:
    return StreamHead(3, 0, stream, SamplingParams(**sampling))


def test_all_texts_of_a_step_travel_in_one_message(bench: Bench) -> None:
    deltas = [TokenDelta(f"r{index}", bench.ids("hi"), head=head()) for index in range(5)]
    bench.scheduler.send("detokenizer", TokenBatch(tuple(deltas[:3])))
    bench.scheduler.send("detokenizer", TokenBatch(tuple(deltas[3:])))
    bench.role.step(0)
    (batch,) = bench.sent(bench.api)
    assert isinstance(batch, TextBatch)
    assert [(item.rid, item.text) for item in batch.items] == [(f"r{index}", "hi") for index in range(5)]


def test_a_step_with_very_many_log_probabilities_takes_several_messages(bench: Bench) -> None:
    entry = TokenLogprob(1, -1.0, tuple((-1.0, token) for token in range(1000)))
    deltas = [TokenDelta(f"r{n}", bench.ids("x"), LENGTH, head(), prompt=(entry,) * 100) for n in range(5)]
    bench.scheduler.send("detokenizer", TokenBatch(tuple(deltas)))
    bench.role.step(0)
    batches = bench.sent(bench.api)
    assert [len(batch.items) for batch in batches if isinstance(batch, TextBatch)] == [2, 2, 1]


def test_characters_over_several_steps(bench: Bench) -> None:
    tokens = bench.ids("é")
    assert [item.text for item in bench.feed(TokenDelta("r", tokens[:1], head=head()))] == [""]
    assert [item.text for item in bench.feed(TokenDelta("r", tokens[1:], LENGTH))] == ["é"]
    assert bench.role.live_count == 0


def test_a_stop_string_is_told_to_the_scheduler_before_the_client_hears_of_it(bench: Bench) -> None:
    (text,) = bench.feed(TokenDelta("r", bench.ids("abSTOPxy"), head=head(stop=("STOP",))))
    assert (text.text, text.finish) == ("ab", Finish(kind="stop", matched="STOP"))
    assert bench.sent(bench.scheduler) == [StopHit("r")]
    assert bench.role.live_count == 0


def test_what_comes_after_a_stop_string_is_dropped(bench: Bench) -> None:
    bench.feed(TokenDelta("r", bench.ids("xSTOP"), head=head(stop=("STOP",))))
    assert bench.feed(TokenDelta("r", bench.ids("more"))) == []
    assert bench.feed(TokenDelta("r", bench.ids("end"), LENGTH)) == []
    bench.sent(bench.scheduler)
    assert bench.feed(TokenDelta("r", bench.ids("new"), LENGTH, head=head()))[0].text == "new"
    assert bench.sent(bench.scheduler) == []


def test_no_stop_hit_when_the_scheduler_has_finished_itself(bench: Bench) -> None:
    (text,) = bench.feed(TokenDelta("r", bench.ids("abSTOP"), LENGTH, head=head(stop=("STOP",))))
    assert text.finish == Finish(kind="stop", matched="STOP")
    assert bench.sent(bench.scheduler) == []


def test_a_request_that_does_not_stream_answers_once(bench: Bench) -> None:
    assert bench.feed(TokenDelta("r", bench.ids("ab"), head=head(stream=False))) == []
    assert bench.feed(TokenDelta("r", bench.ids("cd"))) == []
    (text,) = bench.feed(TokenDelta("r", bench.ids("ef"), LENGTH))
    assert text.text == "abcdef"
    assert text.head is not None


def test_a_refusal_without_a_head_goes_on(bench: Bench) -> None:
    refusal = Finish(kind="abort", message="queue full", status=503)
    (text,) = bench.feed(TokenDelta("r", (), refusal))
    assert (text.rid, text.finish) == ("r", refusal)


def test_the_interval_of_the_server_and_of_the_request(folder: Path) -> None:
    bench = Bench(folder, stream_interval=3)
    for expected, sampling in ((["a", "bcd", "e"], {}), (["a", "bc", "de"], {"stream_interval": 2})):
        texts = []
        for index, letter in enumerate("abcde"):
            finish = LENGTH if letter == "e" else None
            opening = head(**sampling) if index == 0 else None
            texts += bench.feed(TokenDelta("r", bench.ids(letter), finish, opening))
        assert [text.text for text in texts] == expected
    bench.hub.close()


def test_special_tokens(bench: Bench) -> None:
    tokens = (*bench.ids("a"), bench.tokenizer.eos_id or 0, *bench.ids("b"))
    (shown,) = bench.feed(TokenDelta("r", tokens, LENGTH, head=head(skip_special_tokens=False)))
    (hidden,) = bench.feed(TokenDelta("s", tokens, LENGTH, head=head()))
    assert (shown.text, hidden.text) == ("a</s>b", "ab")


def test_without_a_tokenizer_tokens_go_through(folder: Path) -> None:
    bench = Bench(folder, skip_tokenizer_init=True)
    (text,) = bench.feed(TokenDelta("r", (1, 2, 3), LENGTH, head=head()))
    assert (text.text, text.tokens) == ("", (1, 2, 3))
    bench.hub.close()


def test_a_message_for_somebody_else_is_an_error(bench: Bench) -> None:
    bench.scheduler.send("detokenizer", StopHit("r"))
    with pytest.raises(PeerError, match="StopHit"):
        bench.role.step(0)


def test_each_front_gets_the_texts_of_its_own_requests_in_one_message(folder: Path) -> None:
    """The names of requests say to which front they belong, whatever the client has put in front of that."""
    args = ServerArgs.create(model_path=str(folder), tokenizer_worker_num=2)
    hub = Hub((*topology.ROLES, "scheduler-1", *topology.fronts(args)[1:]))
    role = DetokenizerRole(args, load_model_config(str(folder), args), InprocEndpoint("detokenizer", hub))
    second, fronts = InprocEndpoint("scheduler-1", hub), [InprocEndpoint(name, hub) for name in topology.fronts(args)]
    ids = FastTokenizer(folder).encode("hi there")
    rids = [topology.owned(rid, number) for rid, number in (("a", 0), ("a", 1), ("b~0", 1), ("", 0))]
    deltas = [TokenDelta(rid, tuple(ids), head=head(stop=("hi",) if rid == "a~1" else ())) for rid in rids]
    second.send("detokenizer", TokenBatch(tuple(deltas)))
    role.step(0)
    for front, wanted in zip(fronts, (["a~0", "~0"], ["a~1", "b~0~1"]), strict=True):
        (envelope,) = front.recv()
        assert isinstance(envelope.body, TextBatch)
        assert [delta.rid for delta in envelope.body.items] == wanted
    assert [envelope.body for envelope in second.recv()] == [StopHit("a~1")]  # to the replica that has it
    role.close()
    hub.close()


def test_the_successor_of_a_lost_scheduler_goes_on(folder: Path) -> None:
    hub = Hub((*topology.ROLES, "scheduler-1"))
    first, second, api = (InprocEndpoint(name, hub) for name in ("scheduler", "scheduler-1", "api"))
    args, tokenizer = ServerArgs.create(model_path=str(folder)), FastTokenizer(folder)
    role = DetokenizerRole(args, load_model_config(str(folder), args), InprocEndpoint("detokenizer", hub))

    def say(source: InprocEndpoint, text: str, before: StreamHead | None = None, finish: Finish | None = None) -> str:
        source.send("detokenizer", TokenBatch((TokenDelta("r", tuple(tokenizer.encode(text)), finish, before),)))
        role.step(0)
        found = [envelope.body for envelope in api.recv()]
        return "".join(delta.text for body in found if isinstance(body, TextBatch) for delta in body.items)

    assert say(first, "ab", head()) == "ab"
    assert say(second, "bc", StreamHead(3, 0, True, SamplingParams(), again=1, said=1)) == "c"
    assert say(first, "c") == ""  # the last words of the one that is lost come late
    assert say(second, "d", finish=LENGTH) == "d"
    assert role.live_count == 0
    role.close()
    hub.close()
