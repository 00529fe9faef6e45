"""Requests that wait for a grammar. It is compiled once for all who wait; the engine behind keeps what it compiled."""

from __future__ import annotations

from moonlang.base.errors import BugError
from moonlang.core.request import Request, State
from moonlang.core.sampling import GrammarSpec


class GrammarGate:
    """len(gate): how many requests wait."""

    def __init__(self) -> None:
        self._held: dict[GrammarSpec, list[Request]] = {}
        self._unasked: list[GrammarSpec] = []

    def __len__(self) -> int:
        return sum(len(held) for held in self._held.values())

    def hold(self, request: Request, spec: GrammarSpec) -> None:
        """Keep `request` until `spec` is compiled."""
        request.state = State.GRAMMAR
        if spec not in self._held:
            self._held[spec] = []
            self._unasked.append(spec)
        self._held[spec].append(request)

    def wanted(self) -> list[GrammarSpec]:
        """Grammars to compile that have not been named before."""
        wanted, self._unasked = self._unasked, []
        return wanted

    def release(self, spec: GrammarSpec) -> list[Request]:
        """The outcome for `spec` is known: those who waited for it."""
        return self._held.pop(spec, [])

    def drop(self, request: Request) -> None:
        """`request` has ended; a compile for it goes on, for whoever comes next."""
        spec = request.sampling.grammar
        if spec is None or spec not in self._held:
            raise BugError(f"Request {request.rid} does not wait for a grammar.")
        self._held[spec].remove(request)
