"""The output of one request, between scheduler and client: decoded, searched for stops, cut into pieces."""

from __future__ import annotations

import msgspec

from moonlang.base.errors import RequestError
from moonlang.core.messages import StreamHead, TextDelta, TokenDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.text.detokenize import TextStream
from moonlang.text.stop import Hit, StopMatcher

PIECE_LOGPROBS = 200_000  # about 3 MB as a message


def count_logprobs(delta: TokenDelta | TextDelta) -> int:
    """How many log probabilities travel with `delta`."""
    return sum(1 + len(entry.top) + len(entry.ids) for entry in (*delta.prompt, *delta.output))


class Output:
    """Lives from the first delta of a request to its finish; bounded by the tokens that wait for the next piece.

    text: None on a server without a tokenizer. interval: tokens per piece, of which the first comes at once; None: the
    whole output is one piece, unless its log probabilities would make that too large for a message.
    """

    def __init__(
        self, rid: str, head: StreamHead, text: TextStream | None, interval: int | None, source: str = ""
    ) -> None:
        """source: the scheduler that serves it."""
        self.source = source
        self.again = head.again
        self._heard = head.said  # tokens so far
        self._heard_prompt = 0  # log probabilities of the prompt so far
        self._known = 0  # tokens, of those that come, that have been heard before ...
        self._known_prompt = 0  # ... and such log probabilities
        self._rid = rid
        self._head: StreamHead | None = head
        self._text = text
        self._interval = interval
        self._due = 1  # tokens that make the next piece
        self._trim = not head.sampling.no_stop_trim
        self._matcher: StopMatcher | None = None
        if text is not None and (head.sampling.stop or head.sampling.stop_regex):
            self._matcher = StopMatcher(head.sampling.stop, head.sampling.stop_regex, trim=self._trim)
        self._tokens: list[int] = []
        self._shown: list[str] = []  # text of _tokens; filled by the matcher only
        self._output: list[TokenLogprob] = []
        self._prompt: list[TokenLogprob] = []
        self._numbers = 0  # log probabilities in _output and _prompt

    def resume(self, head: StreamHead, source: str) -> None:
        """Another scheduler goes on with it, from behind the first head.said tokens: what it repeats is dropped."""
        self.source, self.again = source, head.again
        self._known = self._heard - head.said
        self._known_prompt = self._heard_prompt

    def push(self, delta: TokenDelta) -> TextDelta | None:
        """Take what the scheduler sent; return the piece that is due now. A piece with a finish is the last one."""
        if self._known or self._known_prompt:
            delta = self._unknown(delta)
        self._heard += len(delta.tokens)
        self._heard_prompt += len(delta.prompt)
        if delta.prompt or delta.output:
            self._numbers += count_logprobs(delta)
            self._prompt += delta.prompt
        finish = delta.finish
        if self._matcher is None:
            self._tokens += delta.tokens
            self._output += delta.output
        else:
            finish = self._search(self._matcher, delta)
        if finish is not None or self._is_due():
            return self._piece(finish, delta.retractions)
        return None

    def _unknown(self, delta: TokenDelta) -> TokenDelta:
        """What of `delta` has not been heard before."""
        tokens, prompt = min(self._known, len(delta.tokens)), min(self._known_prompt, len(delta.prompt))
        self._known -= tokens
        self._known_prompt -= prompt
        return msgspec.structs.replace(
            delta, tokens=delta.tokens[tokens:], output=delta.output[tokens:], prompt=delta.prompt[prompt:]
        )

    def _is_due(self) -> bool:
        if self._numbers >= PIECE_LOGPROBS:
            return True
        return self._interval is not None and len(self._tokens) >= self._due

    def _piece(self, finish: Finish | None, retractions: int) -> TextDelta:
        piece = TextDelta(
            self._rid,
            "".join(self._shown) if self._matcher is not None else self._decode(finish),
            tuple(self._tokens),
            finish,
            self._head,
            tuple(self._output),
            tuple(self._prompt),
            retractions,
        )
        self._head = None
        self._due = self._interval or 0
        self._numbers = 0
        for waiting in (self._tokens, self._shown, self._output, self._prompt):
            waiting.clear()
        return piece

    def _decode(self, finish: Finish | None) -> str:
        """Text of the waiting tokens, to the end when the request is finished."""
        if self._text is None:
            return ""
        if finish is None:
            return self._text.push(self._tokens)
        tokens = self._tokens[:-1] if self._is_stop_token(finish, self._tokens) else self._tokens
        return self._text.push(tokens) + self._text.finish()

    def _search(self, matcher: StopMatcher, delta: TokenDelta) -> Finish | None:
        """Decode token by token, so that the output ends with the token that completes a stop."""
        assert self._text is not None
        silent = len(delta.tokens) - 1 if self._is_stop_token(delta.finish, delta.tokens) else len(delta.tokens)
        for index, token in enumerate(delta.tokens):
            self._tokens.append(token)
            self._output += delta.output[index : index + 1]
            if index < silent:
                finish = self._match(matcher, self._text.push((token,)))
                if finish is not None:
                    return finish
        if delta.finish is None:
            return None
        finish = self._match(matcher, self._text.finish())
        if finish is not None:
            return finish
        self._shown.append(matcher.finish())
        return delta.finish

    def _match(self, matcher: StopMatcher, text: str) -> Finish | None:
        """Show what can be shown of the text behind `text`; a finish when it holds a stop or cannot be searched."""
        if not text:
            return None
        try:
            found = matcher.push(text)
        except RequestError as error:
            return Finish(kind="abort", message=error.message, status=error.status)
        if isinstance(found, Hit):
            self._shown.append(found.text)
            return Finish(kind="stop", matched=found.matched)
        self._shown.append(found)
        return None

    def _is_stop_token(self, finish: Finish | None, tokens: tuple[int, ...] | list[int]) -> bool:
        """True when the last token is one that the request stopped at and that is not part of its text."""
        if finish is None or finish.kind != "stop" or not self._trim:
            return False
        return bool(tokens) and tokens[-1] == finish.matched
