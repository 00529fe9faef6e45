"""No grammars: `--grammar-backend none`. Every request for one is answered with an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from moonlang.base.errors import BugError
from moonlang.core.ports import GrammarMatcher
from moonlang.core.sampling import GrammarSpec
from moonlang.core.ticket import Completion, Outcome, Ticket

_REFUSAL = "This server has no grammar backend; start it with --grammar-backend xgrammar."


class NoGrammars:
    """A GrammarEngine that compiles nothing."""

    def __init__(
        self,
        tokenizer_folder: str = "",
        vocab_size: int = 0,
        eos_token_ids: Sequence[int] = (),
        *,
        any_whitespace: bool = True,
        max_whitespace: int | None = None,
    ) -> None:
        self._tickets = 0
        self._done: list[Completion] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def submit(self, op: GrammarSpec) -> Ticket:
        ticket = Ticket(self._tickets, "grammar")
        self._tickets += 1
        self._done.append(Completion(ticket, Outcome.FAILED, error=_REFUSAL))
        os.eventfd_write(self._event, 1)
        return ticket

    def poll(self) -> Sequence[Completion]:
        with suppress(BlockingIOError):  # nothing was announced
            os.eventfd_read(self._event)
        done, self._done = self._done, []
        return done

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to stop: the completion is on its way already."""

    def close(self) -> None:
        os.close(self._event)

    def fileno(self) -> int:
        return self._event

    def matcher(self, spec: GrammarSpec) -> GrammarMatcher:
        raise BugError(f"A {spec.kind} grammar reached the executor although none was ever compiled.")


BACKEND = NoGrammars
