"""The detokenizer role: tokens of a step in, texts of a step out, stop strings found on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moonlang.base import log
from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import StopHit, StreamHead, TextBatch, TextDelta, TokenBatch, TokenDelta
from moonlang.core.ports import Endpoint
from moonlang.roles import topology
from moonlang.roles.role import NEVER_NS
from moonlang.text.detokenize import Detokenizer
from moonlang.text.output import PIECE_LOGPROBS, Output, count_logprobs
from moonlang.text.tokenizer import load_tokenizer

_log = log.get(__name__)


class DetokenizerRole:
    """Holds one Output per live request and nothing else. See `roles.role.Role` for the contract."""

    def __init__(self, args: ServerArgs, model: ModelConfig, endpoint: Endpoint) -> None:
        self.wait_fds: tuple[int, ...] = ()
        self._endpoint = endpoint
        self._fronts = topology.fronts(args)
        self._interval = args.stream_interval
        self._outputs: dict[str, Output] = {}
        self._detokenizer: Detokenizer | None = None
        if not args.skip_tokenizer_init:
            folder = args.tokenizer_path or model.path
            self._detokenizer = Detokenizer(load_tokenizer(folder, args.trust_remote_code, args.tokenizer_mode))

    @property
    def live_count(self) -> int:
        """Requests with state in this role."""
        return len(self._outputs)

    def ready_body(self) -> dict[str, Any]:
        return {}

    def step(self, now_ns: int) -> int:
        """Turn every batch that has arrived into one batch of texts."""
        while envelopes := self._endpoint.recv():
            texts: list[TextDelta] = []
            for envelope in envelopes:
                if not isinstance(envelope.body, TokenBatch):
                    raise PeerError(f"The detokenizer got a {type(envelope.body).__name__}, which is not for it.")
                for delta in envelope.body.items:
                    text = self._handle(delta, envelope.source)
                    if text is not None:
                        texts.append(text)
            for front, share in self._shares(texts):
                for batch in _messages(share):
                    self._endpoint.send(front, batch)
        return NEVER_NS

    def close(self) -> None:
        self._outputs.clear()

    def _handle(self, delta: TokenDelta, scheduler: str) -> TextDelta | None:
        output = self._outputs.get(delta.rid)
        if delta.head is not None:
            if output is not None and delta.head.again:  # the replica that had begun it is lost
                if delta.head.again > output.again:
                    output.resume(delta.head, scheduler)
            else:
                output = self._outputs[delta.rid] = self._begin(delta.rid, delta.head, scheduler)
        if output is None:
            return _headless(delta)
        if output.source != scheduler:
            return None  # the last words of one that is lost: its successor says them too
        text = output.push(delta)
        if text is not None and text.finish is not None:
            del self._outputs[delta.rid]
            if delta.finish is None:
                # The scheduler learns of it before the client does, who may use the same rid again at once.
                self._tell(scheduler, StopHit(delta.rid))
        return text

    def _tell(self, scheduler: str, hit: StopHit) -> None:
        try:
            self._endpoint.send(scheduler, hit)
        except PeerError as error:  # it is the supervisor's business whether the server goes on without it
            _log.warning("%s was not told of a stop: %s", scheduler, error.message)

    def _shares(self, texts: list[TextDelta]) -> list[tuple[str, list[TextDelta]]]:
        """What each front is to hear."""
        if len(self._fronts) == 1:
            return [(topology.API, texts)]
        shares: list[list[TextDelta]] = [[] for _ in self._fronts]
        for text in texts:
            shares[topology.owner(text.rid)].append(text)
        return [(front, share) for front, share in zip(self._fronts, shares, strict=True) if share]

    def _begin(self, rid: str, head: StreamHead, scheduler: str) -> Output:
        interval = head.sampling.stream_interval or self._interval
        text = None if self._detokenizer is None else self._detokenizer.stream(head.sampling.skip_special_tokens)
        return Output(rid, head, text, interval if head.stream else None, scheduler)


def _messages(texts: list[TextDelta]) -> Iterator[TextBatch]:
    """All texts in one message, or in a few when many log probabilities come with them."""
    begin = numbers = 0
    for index, text in enumerate(texts):
        if text.prompt or text.output:
            numbers += count_logprobs(text)
            if numbers >= PIECE_LOGPROBS:
                yield TextBatch(tuple(texts[begin : index + 1]))
                begin, numbers = index + 1, 0
    if begin < len(texts):
        yield TextBatch(tuple(texts[begin:]))


def _headless(delta: TokenDelta) -> TextDelta | None:
    """A delta of an unknown request: a refusal goes on to the client, what comes after a stop string does not."""
    if delta.finish is None or delta.finish.kind != "abort":
        return None
    return TextDelta(rid=delta.rid, text="", tokens=(), finish=delta.finish)
