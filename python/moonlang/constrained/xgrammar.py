"""Grammars by xgrammar, compiled in worker threads. The first compile imports xgrammar: that takes a second."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moonlang.channels.tickets import Tickets
from moonlang.constrained.vocabulary import read_vocabulary
from moonlang.core.ports import GrammarMatcher
from moonlang.core.sampling import GrammarSpec
from moonlang.core.ticket import Completion, Outcome, Ticket

if TYPE_CHECKING:
    import xgrammar

_CACHE_BYTES = 256 << 20
_WORKERS = 2
_ANY_OBJECT = "$$ANY$$"
_ANY_OBJECT_SCHEMA = '{"type": "object", "additionalProperties": true}'
_SOURCE_POSITION = re.compile(r"^\[[\d:]+\] \S+?:\d+: (Check failed: .*? is false: )?")


class XGrammar:
    """A GrammarEngine. `submit`, `poll` and `cancel` belong to one thread, `matcher` may be called from another.

    any_whitespace, max_whitespace: how much optional whitespace JSON output may have.
    """

    def __init__(
        self,
        tokenizer_folder: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        any_whitespace: bool = True,
        max_whitespace: int | None = None,
    ) -> None:
        self._folder = tokenizer_folder
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._any_whitespace = any_whitespace
        self._max_whitespace = max_whitespace
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="grammar")
        self._lock = threading.Lock()  # guards the cache and the lazy compiler
        self._cache: OrderedDict[GrammarSpec, xgrammar.CompiledGrammar] = OrderedDict()
        self._cache_bytes = 0
        self._running: dict[Ticket, Future[None]] = {}
        self._tickets = Tickets("grammar")

    def submit(self, op: GrammarSpec) -> Ticket:
        """Compile a grammar; the error of a FAILED completion is a sentence for the client."""
        ticket = self._tickets.issue()
        self._running[ticket] = self._pool.submit(self._work, ticket, op)
        return ticket

    def poll(self) -> Sequence[Completion]:
        done = self._tickets.take()
        for completion in done:
            self._running.pop(completion.ticket, None)
        return done

    def cancel(self, ticket: Ticket) -> None:
        """Takes effect when the compile has not begun."""
        future = self._running.get(ticket)
        if future is not None and future.cancel():
            self._tickets.complete(Completion(ticket, Outcome.CANCELLED))

    def close(self) -> None:
        """Wait for the compiles that run; the others are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tickets.close()

    def fileno(self) -> int:
        return self._tickets.fileno()

    def matcher(self, spec: GrammarSpec) -> GrammarMatcher:
        """A fresh automaton; compiles again when the cache has dropped the grammar meanwhile."""
        return _Matcher(self._compiled(spec), self._vocab_size, self._eos)

    def _work(self, ticket: Ticket, spec: GrammarSpec) -> None:
        try:
            self._compiled(spec)
        except (RuntimeError, ValueError, TypeError) as error:
            detail = _SOURCE_POSITION.sub("", str(error)).strip().rstrip(".")
            message = f"The {spec.kind} is not a grammar that can be enforced: {detail}."
            self._tickets.complete(Completion(ticket, Outcome.FAILED, error=message))
        else:
            self._tickets.complete(Completion(ticket, Outcome.OK, count=1))

    def _compiled(self, spec: GrammarSpec) -> xgrammar.CompiledGrammar:
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
                return self._cache[spec]
            compiler = self._compiler
        compiled = self._compile(compiler, spec)
        with self._lock:
            if spec not in self._cache:
                self._cache[spec] = compiled
                self._cache_bytes += compiled.memory_size_bytes
            while self._cache_bytes > _CACHE_BYTES and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cache_bytes -= dropped.memory_size_bytes
        return compiled

    def _compile(self, compiler: xgrammar.GrammarCompiler, spec: GrammarSpec) -> xgrammar.CompiledGrammar:
        """Raises RuntimeError or ValueError with xgrammar's or json's words."""
        match spec.kind:
            case "json_schema":
                return compiler.compile_json_schema(
                    _schema(spec.source),
                    any_whitespace=self._any_whitespace,
                    max_whitespace_cnt=self._max_whitespace,
                )
            case "regex":
                return compiler.compile_regex(spec.source)
            case "ebnf":
                return compiler.compile_grammar(spec.source)
            case "structural_tag":
                return compiler.compile_structural_tag(json.dumps(_object(spec.source)))

    @cached_property
    def _compiler(self) -> xgrammar.GrammarCompiler:
        import xgrammar

        vocabulary = read_vocabulary(self._folder, self._vocab_size)
        if vocabulary is None:
            tokenizer = _hugging_face_tokenizer(self._folder)
            tokens = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._eos or None
            )
        else:
            tokens = xgrammar.TokenizerInfo(
                vocabulary.tokens,
                xgrammar.VocabType[vocabulary.encoding.upper()],
                vocab_size=self._vocab_size,
                stop_token_ids=self._eos,
                add_prefix_space=vocabulary.prefix_space,
            )
        return xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)


def _hugging_face_tokenizer(folder: str) -> Any:
    """The slow way, for tokenizers that are not byte-level and not byte-fallback BPE."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _schema(source: str) -> str:
    if source == _ANY_OBJECT:
        return _ANY_OBJECT_SCHEMA
    schema = json.loads(source)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    return json.dumps(schema)


def _object(source: str) -> dict[str, Any]:
    value = json.loads(source)
    if not isinstance(value, dict):
        raise ValueError("a structural tag is a JSON object")
    return value


class _Matcher:
    """One sequence in one grammar. The mask of the next token is computed at most once per token."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._mask_is_new = False
        ends = np.zeros(self._mask.shape[1] * 32, np.uint8)
        ends[[token for token in eos_token_ids if token < vocab_size]] = 1
        self._not_ends = ~np.packbits(ends, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        self._mask_is_new = False
        return self._matcher.accept_token(token)

    def fill_bitmask(self, bitmask: NDArray[np.int32], row: int) -> None:
        self._refresh()
        bitmask[row] = self._mask[0]

    @property
    def ended(self) -> bool:
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        self._refresh()
        return not (self._mask[0] & self._not_ends).any()

    def _refresh(self) -> None:
        if not self._mask_is_new:
            self._matcher.fill_next_token_bitmask(self._mask, 0)
            self._mask_is_new = True


def _why_not() -> str:
    """Without importing it, which takes a second."""
    return "" if importlib.util.find_spec("xgrammar") else "the package xgrammar is not installed"


BACKEND = XGrammar
PROBE = _why_not
