"""Each client gets exactly the tokens of the oracle, once, in order, and exactly one end that is the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from moonlang.core.messages import TokenDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.sim.chain import ChainModel
from moonlang.sim.checkers.watch import Watch
from moonlang.sim.client import Client
from moonlang.sim.violation import Violation

_NAME = "delivery"


class Audience(Protocol):
    """The clients of a world. longest: tokens that a prompt and its output may have together."""

    @property
    def clients(self) -> Mapping[str, Client]: ...
    @property
    def model(self) -> ChainModel: ...
    @property
    def page_size(self) -> int: ...
    @property
    def longest(self) -> int: ...
    def excuse(self, client: Client, finish: Finish) -> bool:
        """Whether there has been cause for this end of a request."""
        ...


class Delivery(Watch[Audience]):
    """Compares every delta with the answer that follows from the prompt alone."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[list[int], Finish]] = {}

    def on_delta(self, audience: Audience, delta: TokenDelta) -> None:
        client = audience.clients.get(delta.rid)
        if client is None or client.is_done:
            raise Violation(_NAME, f"{delta} for a client that {'is done' if client else 'does not exist'}")
        refused = delta.head is None and delta.finish is not None and delta.finish.kind == "abort"
        if (delta.head is None) != (client.head is not None) and not refused:
            raise Violation(_NAME, f"{delta} is not the first delta with a head, or has a second head")
        if client.head is None and delta.head is not None:
            self._check_head(audience, client, delta)
        answer, finish = self._answer(audience, client)
        so_far = len(client.tokens)
        if list(delta.tokens) != answer[so_far : so_far + len(delta.tokens)]:
            raise Violation(_NAME, f"{delta.rid} gets {delta.tokens} after {so_far} tokens of {answer}")
        if delta.finish is not None:
            output = client.tokens + list(delta.tokens)
            self._check_finish(audience, client, delta.finish, output, (answer, finish))
            self._check_logprobs(client, delta)

    def at_end(self, audience: Audience) -> None:
        for client in audience.clients.values():
            if not client.is_done:
                raise Violation(_NAME, f"{client.script.rid} never ends")

    def _answer(self, audience: Audience, client: Client) -> tuple[list[int], Finish]:
        rid = client.script.rid
        if rid not in self._answers:
            most = output_limit(audience, client)
            self._answers[rid] = audience.model.answer(client.prompt, client.script.sampling, most)
        return self._answers[rid]

    def _check_head(self, audience: Audience, client: Client, delta: TokenDelta) -> None:
        head, size = delta.head, len(client.prompt)
        assert head is not None
        whole_pages = head.cached_tokens % audience.page_size == 0
        if head.prompt_tokens != size or not 0 <= head.cached_tokens < max(1, size) or not whole_pages:
            raise Violation(_NAME, f"{delta} has a wrong head for a prompt of {len(client.prompt)} tokens")

    def _check_finish(
        self, audience: Audience, client: Client, got: Finish, output: Sequence[int], answer: tuple[list[int], Finish]
    ) -> None:
        tokens, finish = answer
        rid = client.script.rid
        if got.kind == "abort":
            if not audience.excuse(client, got):
                raise Violation(_NAME, f"{rid} ends with {got} for no reason")
        elif len(output) != len(tokens) or (got.kind, got.matched) != (finish.kind, finish.matched):
            raise Violation(
                _NAME, f"{rid} ends with {got} after {len(output)} tokens, not {finish} after {len(tokens)}"
            )

    def _check_logprobs(self, client: Client, delta: TokenDelta) -> None:
        """The executor writes the position of each entry into its value: they must come complete and in order."""
        spec = client.script.logprob
        tokens = client.tokens + list(delta.tokens)
        output = client.output + list(delta.output)
        prompt = client.prompt_logprobs + list(delta.prompt)
        size = len(client.prompt)
        wanted_output = [] if spec is None else _entries(tokens, size)
        if output != wanted_output:
            raise Violation(_NAME, f"{delta.rid} has output logprobs {output}, not {wanted_output}")
        wanted_prompt = [] if spec is None or spec.start < 0 else _entries(client.prompt, 0)[spec.start :]
        aborted = delta.finish is not None and delta.finish.kind == "abort"
        if prompt != (wanted_prompt[: len(prompt)] if aborted else wanted_prompt):
            raise Violation(_NAME, f"{delta.rid} has prompt logprobs {prompt}, not {wanted_prompt}")


def _entries(tokens: Sequence[int], first: int) -> list[TokenLogprob]:
    return [TokenLogprob(token, -float(p) if p else None) for p, token in enumerate(tokens, first)]


def output_limit(audience: Audience, client: Client) -> int:
    """Output tokens that the request may have at most."""
    room = max(0, audience.longest - len(client.prompt))
    most = client.script.sampling.max_new_tokens
    return room if most is None else min(most, room)
