"""How much memory running requests are going to ask for: the share of their remaining output that is reserved.

Reserving everything wastes the pool, since most outputs end early; reserving nothing makes the pool run full and
requests be retracted. The ratio starts high, decays while all goes well and jumps up at a retraction, as users of
SGLang know it: start 0.7, floor 0.14 of that, 600 steps; outputs are counted up to 4,096 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from moonlang.core.request import Request

_START = 0.7
_FLOOR_SHARE = 0.14
_DECAY_STEPS = 600
_AFTER_RETRACTION_STEPS = 20
_OUTPUT_CLIP = 4096


class NewTokenRatio:
    """The share of remaining output tokens to reserve, 0 .. 1."""

    def __init__(self, conservativeness: float) -> None:
        self.value = self._start = min(1.0, _START * conservativeness)
        self._floor = self._start * _FLOOR_SHARE
        self._decay = (self._start - self._floor) / _DECAY_STEPS

    def reserve(self, request: Request) -> int:
        """Output tokens of `request` to keep memory for."""
        return int(min(request.remaining, _OUTPUT_CLIP) * self.value)

    def relax(self) -> None:
        """One more plan without trouble."""
        self.value = max(self._floor, self.value - self._decay)

    def restart(self) -> None:
        """Nothing runs any more: what was learned is about other requests."""
        self.value = self._start

    def tighten(self, running: Iterable[Request]) -> None:
        """A request was retracted: estimate from how far the others have come."""
        done = wanted = 0
        for request in running:
            done += request.output_len + _AFTER_RETRACTION_STEPS
            wanted += request.output_len + request.remaining
        self.value = min(1.0, max(self.value, done / max(1, wanted)))
