"""Is it quicker to load a prefix or to compute it? Decided from what both have taken lately."""

from __future__ import annotations

_KEPT = 0.6  # of the weight of older samples, at every new one
_FORGET = 0.9  # a tier that was not asked because it seemed too slow is given more credit at every refusal


class Rate:
    """Time per unit: the mean over recent samples, each weighing as much as it has units. 0, the best, before the
    first."""

    def __init__(self) -> None:
        self._ns = 0.0
        self._units = 0.0

    def sample(self, units: int, ns: int) -> None:
        if units > 0:
            self._ns = _KEPT * self._ns + ns
            self._units = _KEPT * self._units + units

    def estimate_ns(self, units: int) -> int:
        return int(self._ns / self._units * units) if self._units else 0

    def relent(self) -> None:
        """Trust the tier a little more, so that one bad sample does not lock it out for ever."""
        self._ns *= _FORGET
