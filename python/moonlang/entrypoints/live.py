"""Sequences between being sent and being finished, and what metrics and logs want to know of them."""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.base import clock
from moonlang.core.messages import Generate, TextDelta
from moonlang.core.request import Finish
from moonlang.entrypoints.stream import Stream
from moonlang.observability.figures import Figures
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import Finished, RequestLog


class Live:
    """A sequence that has not finished. stream: None once its client is gone; index: its place there.

    rid: as the client knows it. observed: False for the server's own requests, and for those that came before anybody
    looked. tokens, prompt and cached count tokens so far. replica: which serves it, where it counts with `size` tokens.
    message, said: what to send to another one when that is lost; None when that ends the server.
    """

    __slots__ = (
        *("cached", "first_ns", "index", "last_ns", "message", "observed", "prompt", "queue_ns"),
        *("replica", "rid", "said", "size", "start_ns", "stream", "streaming", "tokens"),
    )

    def __init__(
        self, stream: Stream, index: int, message: Generate, observed: bool, now_ns: int, replica: int
    ) -> None:
        self.stream: Stream | None = stream
        self.index = index
        self.rid = message.rid
        self.streaming = message.stream
        self.observed = observed
        self.start_ns = now_ns
        self.first_ns = 0
        self.last_ns = 0
        self.tokens = 0
        self.prompt = self.size = len(message.input_ids)
        self.replica = replica
        self.message: Generate | None = None
        self.said: list[int] | None = None
        self.cached = 0
        self.queue_ns = 0


class Watch:
    """Feeds metrics and request log. Times are taken where texts arrive: they hold everything but the socket."""

    def __init__(
        self, metrics: ServerMetrics | None, request_log: RequestLog | None, figures: Sequence[Figures] | None = None
    ) -> None:
        self._metrics = metrics
        self._log = request_log
        self.figures = figures  # by replica

    def started(self, message: Generate) -> None:
        if self._metrics is not None:
            self._metrics.started(message.stream, message.sampling.grammar is not None)
        if self._log is not None:
            self._log.received(message)

    def delta(self, live: Live, delta: TextDelta, now_ns: int) -> None:
        metrics, figures = self._metrics, self.figures
        if delta.head is not None:
            live.prompt, live.cached = delta.head.prompt_tokens, delta.head.cached_tokens
            live.queue_ns = delta.head.queue_ns
            if metrics is not None:
                metrics.queue_s[live.replica].observe(live.queue_ns / clock.NS_PER_S)
            if figures is not None:
                figures[live.replica].queue_s.observe(live.queue_ns / clock.NS_PER_S)
        count = len(delta.tokens)
        if count:
            if live.first_ns == 0:
                live.first_ns = now_ns
                if metrics is not None:
                    metrics.time_to_first_token_s.observe(live.streaming, (now_ns - live.start_ns) / clock.NS_PER_S)
                if figures is not None and live.streaming:  # without a stream the first token comes with the last
                    figures[live.replica].time_to_first_token_s.observe((now_ns - live.start_ns) / clock.NS_PER_S)
            elif live.streaming:
                gap_s = (now_ns - live.last_ns) / clock.NS_PER_S / count
                if metrics is not None:
                    metrics.inter_token_s.observe(gap_s, count)
                if figures is not None:
                    figures[live.replica].inter_token_s.observe(gap_s, count)
            live.last_ns = now_ns
            live.tokens += count
        if delta.finish is not None:
            self._finished(live, delta.finish, now_ns)

    def _finished(self, live: Live, finish: Finish, now_ns: int) -> None:
        e2e_s = (now_ns - live.start_ns) / clock.NS_PER_S
        if self._log is not None:
            end = Finished(
                rid=live.rid,
                finish=finish.kind,
                message=finish.message,
                prompt_tokens=live.prompt,
                cached_tokens=live.cached,
                completion_tokens=live.tokens,
                queue_s=live.queue_ns / clock.NS_PER_S,
                first_token_s=(live.first_ns - live.start_ns) / clock.NS_PER_S if live.first_ns else None,
                e2e_s=e2e_s,
            )
            self._log.finished(end)
        if self.figures is not None and finish.kind != "abort":
            self.figures[live.replica].e2e_s.observe(e2e_s)
        if self._metrics is None:
            return
        if finish.kind == "abort":
            self._metrics.aborted()
            return
        self._metrics.ended(
            live.streaming,
            prompt=live.prompt,
            cached=live.cached,
            output=live.tokens,
            e2e_s=e2e_s,
            decode_s=(live.last_ns - live.first_ns) / clock.NS_PER_S,
        )
