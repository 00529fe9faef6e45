"""An engine for tests of the entrypoints: a thread behind the in-process mailboxes that speaks without any model.

It answers each request with the prompt, backwards, one character (= token) per step, until max_new_tokens or the prompt
is used up. What it was told is written down. A request with extra_key ending in "hold" says one token and then nothing;
one with "refuse:STATUS" is refused with that status; with "break:STATUS" it breaks after two tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from moonlang.base import clock
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, Generate, Message, Reply, StreamHead, TextBatch, TextDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.entrypoints.client import EngineClient
from moonlang.mem_cache.tiers import TierStats
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.observability.metrics import ServerMetrics
from moonlang.scheduler.settings import PairStats
from moonlang.text.pieces import Pieces

CONTEXT = 64
VOCAB = 256
LOADS: dict[str, Any] = {
    "num_running": 2,
    "num_waiting": 1,
    "num_grammar": 0,
    "num_pages": 10,
    "page_size": 4,
    "used_tokens": 12,
    "cached_tokens": 8,
    "free_tokens": 20,
    "max_total_tokens": 40,
    "waiting_tokens": 5,
    "new_token_ratio": 0.7,
    "total_prompt_tokens": 6,
    "total_cached_tokens": 3,
    "total_output_tokens": 9,
    "total_retractions": 0,
    "token_usage": 0.3,
    "cache_hit_rate": 0.5,
    "gen_throughput": 7.0,
    "pairs": msgspec.to_builtins(PairStats()),
    "tiers": msgspec.to_builtins(TierStats()),
}


TREE: dict[str, Any] = {
    "parent": [-1, 0],
    "id": [1, 2],
    "pages": [0, 3],
    "weight": [3, 3],
    "children": [1, 0],
    "hits": [0, 2],
    "idle": [0, 1],
    "locked": [0, 1],
    "tokens": [[], [72, 105]],
    "num_nodes": 1,
}


class CharTokenizer:
    """One token per character; character 0 is nothing."""

    vocab_size = VOCAB
    bos_id = None
    eos_id = 1
    special_tokens: dict[str, str] = {"eos_token": "\1"}  # noqa: RUF012 - as the protocol has it

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [min(ord(char), VOCAB - 1) for char in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def id_to_token(self, token: int) -> str | None:
        return chr(token)

    def token_to_id(self, text: str) -> int | None:
        return ord(text)

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        return None


def model_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "path": "/models/fake",
        "hf": {},
        "architectures": ("FakeForCausalLM",),
        "model_type": "fake",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "context_length": CONTEXT,
        "dtype": "float32",
        "eos_token_ids": (1,),
        "generation": {},
    }
    return ModelConfig(**{**fields, **changes})


class FakeEngine:
    """Context manager: starts and stops the thread. `client()` makes the one client of it."""

    def __init__(self) -> None:
        self.hub = Hub(("api", "scheduler"))
        self.received: list[Message] = []
        self.flush_ok = True
        self.silent = False  # neither answers nor generates
        self._endpoint = InprocEndpoint("scheduler", self.hub)
        self._live: dict[str, _Talk] = {}
        self._stop = threading.Event()
        self._seen = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake-engine")

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.hub.close()

    def client(self, args: ServerArgs | None = None, *, metrics: bool = False, **model: Any) -> EngineClient:
        ready = {"scheduler": {"max_running_requests": 8, "kv_page_bytes": 1000, "max_req_input_len": CONTEXT - 1}}
        return EngineClient(
            InprocEndpoint("api", self.hub),
            CharTokenizer(),
            model_config(**model),
            args or ServerArgs(),
            ready,
            metrics=ServerMetrics("fake") if metrics else None,
        )

    def wait_for(self, kind: type[Message], count: int = 1, timeout_s: float = 60) -> list[Any]:
        """Block until `count` messages of a kind have arrived."""

        def found() -> list[Message]:
            return [message for message in self.received if isinstance(message, kind)]

        with self._seen:
            assert self._seen.wait_for(lambda: len(found()) >= count, timeout_s), f"no {count} x {kind.__name__}"
            return found()

    def _run(self) -> None:
        while not self._stop.is_set():
            talking = any(not talk.held for talk in self._live.values())
            self._endpoint.wait(0 if talking else 5 * clock.NS_PER_MS)
            for envelope in self._endpoint.recv():
                with self._seen:
                    self.received.append(envelope.body)
                    self._seen.notify_all()
                self._handle(envelope.body)
            deltas = [delta for talk in list(self._live.values()) if (delta := talk.step()) is not None]
            self._say(deltas)

    def _handle(self, body: Message) -> None:
        if self.silent:
            return
        if isinstance(body, Generate):
            self._live[body.rid] = _Talk(body)
        elif isinstance(body, Abort):
            gone = Finish(kind="abort", message=body.message, status=499)
            doomed = [
                rid
                for rid in self._live
                if body.abort_all or (rid == body.rid if body.exact else rid.startswith(body.rid))
            ]
            self._say([TextDelta(rid=rid, text="", tokens=(), finish=gone) for rid in doomed])
        elif isinstance(body, Control):
            ok = self.flush_ok or body.verb != "flush_cache"
            message = "" if ok else "The cache is in use."
            self._endpoint.send("api", Reply(body.id, ok, message, {"loads": LOADS, "tree": TREE}.get(body.verb, {})))

    def _say(self, deltas: list[TextDelta]) -> None:
        for delta in deltas:
            if delta.finish is not None:
                del self._live[delta.rid]
        if deltas:
            self._endpoint.send("api", TextBatch(tuple(deltas)))


class _Talk:
    """One request being answered."""

    def __init__(self, message: Generate) -> None:
        self._message = message
        limit = message.sampling.max_new_tokens
        words = message.input_ids[::-1]
        self._limited = limit is not None and limit < len(words)
        self._left = words[:limit]
        self._said = 0
        self._command, _, status = message.extra_key.rpartition(":")[2].rpartition(" ")
        self._status = int(status) if status.isdigit() else 0
        self.held = False

    def step(self) -> TextDelta | None:
        message = self._message
        if self.held:
            return None
        if self._command.endswith("refuse") or (self._command.endswith("break") and self._said == 2):
            finish = Finish(kind="abort", message="It was not to be.", status=self._status)
            return TextDelta(rid=message.rid, text="", tokens=(), finish=finish)
        head = None
        if self._said == 0:
            head = StreamHead(
                prompt_tokens=len(message.input_ids), cached_tokens=2, stream=message.stream, sampling=message.sampling
            )
        tokens = tuple(self._left[self._said : self._said + 1])
        self._said += 1
        self.held = message.extra_key.endswith("hold")
        finish = None
        if self._said >= len(self._left):
            length = Finish(kind="length", length=len(self._left))
            finish = length if self._limited else Finish(kind="stop", matched=1)
        wants = message.logprob is not None
        return TextDelta(
            rid=message.rid,
            text="".join(map(chr, tokens)),
            tokens=tokens,
            finish=finish,
            head=head,
            output=tuple(_entry(message, token) for token in tokens) if wants else (),
            prompt=_prompt_entries(message) if head is not None else (),
        )


def _prompt_entries(message: Generate) -> tuple[TokenLogprob, ...]:
    spec = message.logprob
    if spec is None or spec.start < 0:
        return ()
    first = (TokenLogprob(token=message.input_ids[0], logprob=None),) if spec.start == 0 else ()
    return first + tuple(_entry(message, token) for token in message.input_ids[max(spec.start, 1) :])


def _entry(message: Generate, token: int) -> TokenLogprob:
    spec = message.logprob
    assert spec is not None
    top = tuple((-0.5 * rank, (token + rank) % VOCAB) for rank in range(spec.top))
    return TokenLogprob(token=token, logprob=-0.5, top=top, ids=tuple((-2.0, chosen) for chosen in spec.ids))
