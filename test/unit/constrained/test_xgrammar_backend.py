"""The xgrammar backend over a byte-level tokenizer made here: tickets, masks, the end of a grammar, the cache."""

import json
import random
import select
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moonlang.base.registry import find
from moonlang.constrained import xgrammar as backend
from moonlang.core.sampling import GrammarSpec
from moonlang.core.ticket import Outcome

EOS = 1
EXTRA = ["true", "false", '{"', '":', "12", "Ġ"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer.json with one token per byte, a few longer ones and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = list(dict.fromkeys(["<s>", "</s>", *alphabet, *EXTRA]))
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


VOCAB = 300  # padded beyond the tokenizer's size, as models do


@pytest.fixture(scope="module")
def engine(folder):
    engine = find("constrained", "xgrammar").BACKEND(str(folder), VOCAB, (EOS,))
    yield engine
    engine.close()


def complete(engine, ticket):
    """Wait for one completion, with a deadline."""
    while select.select([engine], [], [], 30)[0]:
        for completion in engine.poll():
            if completion.ticket == ticket:
                assert not select.select([engine], [], [], 0)[0]
                return completion
    raise AssertionError("no completion within 30 s")


def compile_ok(engine, kind, source):
    spec = GrammarSpec(kind, source)
    completion = complete(engine, engine.submit(spec))
    assert completion.outcome is Outcome.OK, completion.error
    return engine.matcher(spec)


def allowed(matcher):
    bits = np.zeros((2, -(-VOCAB // 32)), np.int32)
    matcher.fill_bitmask(bits, 1)
    assert not bits[0].any()
    return np.flatnonzero(np.unpackbits(bits[1].view(np.uint8), bitorder="little")).tolist()


def walk(matcher, rng, limit=200):
    """Follow the grammar at random to its end; the tokens without the end token."""
    tokens = []
    while not matcher.ended and len(tokens) < limit:
        choices = allowed(matcher)
        token = EOS if EOS in choices and rng.random() < 0.3 else rng.choice(choices)
        assert matcher.accept(token)
        if token == EOS:
            assert matcher.ended
            return tokens
        tokens.append(token)
    return tokens


def test_regex_allows_exactly_what_it_says(engine, tokenizer):
    matcher = compile_ok(engine, "regex", "ab|ad")
    assert [tokenizer.id_to_token(t) for t in allowed(matcher)] == ["a"]
    assert not matcher.accept(tokenizer.token_to_id("b"))
    assert matcher.accept(tokenizer.token_to_id("a"))
    assert sorted(tokenizer.id_to_token(t) for t in allowed(matcher)) == ["b", "d"]
    assert not matcher.ended
    assert matcher.accept(tokenizer.token_to_id("d"))
    assert matcher.ended


def test_a_grammar_that_may_go_on_has_not_ended(engine, tokenizer):
    matcher = compile_ok(engine, "regex", "[0-9]+")
    assert matcher.accept(tokenizer.token_to_id("12"))
    assert not matcher.ended
    assert EOS in allowed(matcher)
    assert matcher.accept(EOS)
    assert matcher.ended


@pytest.mark.parametrize("seed", range(5))
def test_json_schema_output_is_valid(engine, tokenizer, seed):
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["on", "n"],
        "additionalProperties": False,
    }
    matcher = compile_ok(engine, "json_schema", json.dumps(schema))
    value = json.loads(tokenizer.decode(walk(matcher, random.Random(seed), 2000)))
    assert isinstance(value["on"], bool)
    assert 0 <= value["n"] <= 99


def test_any_means_any_object(engine, tokenizer):
    for text, fits in (('{"x": [1, {"y": null}]}', True), ("{}", True), ("[1]", False), ("3", False)):
        matcher = compile_ok(engine, "json_schema", "$$ANY$$")
        ok = all(matcher.accept(t) for t in tokenizer.encode(text).ids) and matcher.accept(EOS)
        assert ok is fits, text


def test_ebnf_and_structural_tag(engine, tokenizer):
    matcher = compile_ok(engine, "ebnf", 'root ::= "x" [yz]')
    assert [matcher.accept(tokenizer.token_to_id(c)) for c in "xz"] == [True, True]
    assert matcher.ended
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "hey"}}
    matcher = compile_ok(engine, "structural_tag", json.dumps(tag))
    assert [matcher.accept(tokenizer.token_to_id(c)) for c in "hey"] == [True] * 3


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", "{bad", "Expecting property name"),
        ("json_schema", "3", "a JSON schema is an object"),
        ("json_schema", '{"type": "foo"}', 'Unsupported type "foo"'),
        ("regex", "(ab", "parenthesis is not closed"),
        ("ebnf", "root ::= x", 'Rule "x" is not defined'),
        ("structural_tag", "[]", "a structural tag is a JSON object"),
        ("structural_tag", "{}", "Structural tag"),
    ],
)
def test_a_bad_grammar_fails_with_a_sentence(engine, kind, source, words):
    completion = complete(engine, engine.submit(GrammarSpec(kind, source)))
    assert completion.outcome is Outcome.FAILED
    assert words in completion.error
    assert completion.error.startswith(f"The {kind} is not a grammar that can be enforced: ")
    assert completion.error.endswith(".")
    assert "/project" not in completion.error


def test_every_ticket_completes_once_also_when_cancelled(folder, monkeypatch):
    engine = backend.XGrammar(str(folder), VOCAB, (EOS,))
    gate = threading.Event()
    inner = engine._compiled
    monkeypatch.setattr(engine, "_compiled", lambda spec: (gate.wait(30), inner(spec)))
    tickets = [engine.submit(GrammarSpec("regex", f"a{i}")) for i in range(5)]
    for ticket in tickets:
        engine.cancel(ticket)
    cancelled = engine.poll()
    assert [c.outcome for c in cancelled] == [Outcome.CANCELLED] * 3  # two were being compiled already
    assert [c.ticket.id for c in cancelled] == [2, 3, 4]
    gate.set()
    rest = []
    while len(rest) < 2 and select.select([engine], [], [], 30)[0]:
        rest += engine.poll()
    assert sorted((c.ticket.id, c.outcome) for c in rest) == [(0, Outcome.OK), (1, Outcome.OK)]
    assert not engine.poll()
    engine.close()


def test_the_cache_is_bounded_and_a_dropped_grammar_comes_back(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(backend, "_CACHE_BYTES", 1)
    engine = backend.XGrammar(str(folder), VOCAB, (EOS,))
    for source in ("ab", "cd", "ef"):
        compile_ok(engine, "regex", source)
    assert len(engine._cache) == 1
    matcher = engine.matcher(GrammarSpec("regex", "ab"))
    assert allowed(matcher) == [tokenizer.token_to_id("a")]
    engine.close()


def test_none_refuses(folder):
    engine = find("constrained", "none").BACKEND(str(folder), VOCAB, (EOS,))
    ticket = engine.submit(GrammarSpec("regex", "a"))
    completion = complete(engine, ticket)
    assert completion.outcome is Outcome.FAILED
    assert "--grammar-backend" in completion.error
    engine.close()
