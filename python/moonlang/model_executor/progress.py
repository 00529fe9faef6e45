"""How far the plan under way is, for the thread that wants to send pages while the rest is computed."""

from __future__ import annotations

import os

import numpy as np

_LAYER_BITS = 16


class Progress:
    """One word of memory, written by whoever runs a forward (kernels too) and read by any thread.

    It holds plan id and layers done in one, so that a reader never sees parts of two plans. event: an eventfd that is
    raised with every report. every: layers between two reports of the present plan, 0 for none.
    """

    def __init__(self, event: int) -> None:
        self.event = event
        self.every = 0
        self.base = 0  # the word for the present plan without a layer done
        self._word = np.zeros(1, np.int64)

    @property
    def address(self) -> int:
        """Where the word is: base + layers is to be stored there."""
        return self._word.ctypes.data

    def begin(self, plan_id: int, every: int) -> None:
        """A plan starts."""
        self.base, self.every = plan_id << _LAYER_BITS, every
        self._word[0] = self.base

    def stored(self, layers: int) -> None:
        """The keys and values of the first `layers` layers are in the pool."""
        if self.every and layers % self.every == 0:
            self._word[0] = self.base + layers
            os.eventfd_write(self.event, 1)

    def read(self) -> tuple[int, int]:
        """(plan id, layers done)."""
        word = int(self._word[0])
        return word >> _LAYER_BITS, word & ((1 << _LAYER_BITS) - 1)
