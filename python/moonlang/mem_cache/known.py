"""What is believed of a store without asking it."""

from __future__ import annotations


class Known:
    """Keys believed to be in the store, and keys found absent a short while ago. Bounded; the oldest go first."""

    def __init__(self, *, most: int = 1 << 18, absent_ns: int = 1_000_000_000) -> None:
        self._most = most
        self._absent_ns = absent_ns
        self._present: dict[bytes, None] = {}
        self._absent: dict[bytes, int] = {}  # key -> when it was looked for

    def stored(self, key: bytes) -> None:
        self._absent.pop(key, None)
        self._present[key] = None
        if len(self._present) > self._most:
            del self._present[next(iter(self._present))]

    def missed(self, key: bytes, now_ns: int) -> None:
        self._present.pop(key, None)
        self._absent.pop(key, None)
        self._absent[key] = now_ns
        if len(self._absent) > self._most:
            del self._absent[next(iter(self._absent))]

    def is_stored(self, key: bytes) -> bool:
        return key in self._present

    def is_absent(self, key: bytes, now_ns: int) -> bool:
        """Looked for a moment ago, in vain: not worth another question."""
        seen = self._absent.get(key)
        return seen is not None and now_ns - seen < self._absent_ns

    def forget_stored(self) -> None:
        self._present.clear()

    def clear(self) -> None:
        self._present.clear()
        self._absent.clear()
