"""Is it quicker to load a prefix or to compute it? Decided from what both have taken lately."""

from __future__ import annotations

_WEIGHT = 0.2  # of a new sample
_FORGET = 0.9  # a tier that was not asked because it seemed too slow is given more credit at every refusal


class Rate:
    """Time per unit as an exponentially weighted mean of samples; 0, the best, before the first."""

    def __init__(self) -> None:
        self._ns = 0.0

    def sample(self, units: int, ns: int) -> None:
        if units > 0:
            value = ns / units
            self._ns = value if self._ns == 0.0 else self._ns + _WEIGHT * (value - self._ns)

    def estimate_ns(self, units: int) -> int:
        return int(self._ns * units)

    def relent(self) -> None:
        """Trust the tier a little more, so that one bad sample does not lock it out for ever."""
        self._ns *= _FORGET
