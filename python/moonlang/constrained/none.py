"""No grammars: `--grammar-backend none`. Every request for one is answered with an error."""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.base.errors import BugError
from moonlang.channels.tickets import Tickets
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
        self._tickets = Tickets("grammar")

    def submit(self, op: GrammarSpec) -> Ticket:
        ticket = self._tickets.issue()
        self._tickets.complete(Completion(ticket, Outcome.FAILED, error=_REFUSAL))
        return ticket

    def poll(self) -> Sequence[Completion]:
        return self._tickets.take()

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to stop: the completion is on its way already."""

    def close(self) -> None:
        self._tickets.close()

    def fileno(self) -> int:
        return self._tickets.fileno()

    def matcher(self, spec: GrammarSpec) -> GrammarMatcher:
        raise BugError(f"A {spec.kind} grammar reached the executor although none was ever compiled.")


BACKEND = NoGrammars
