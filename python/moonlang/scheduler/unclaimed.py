"""Rooms of which a prefill instance has heard from one side only: bounded in number and in time."""

from __future__ import annotations

from dataclasses import dataclass

from moonlang.core.pairing import KvCard, Refuse, Want


@dataclass(frozen=True, slots=True)
class EarlyWant:
    """A Want whose request has not come yet."""

    card: KvCard
    want: Want
    heard_ns: int


@dataclass(frozen=True, slots=True)
class _Entry:
    body: EarlyWant | Refuse | str
    until_ns: int


class Unclaimed:
    """What is known of rooms without a request: a Want that came early, a Refuse for the Want of a request that has
    ended before it came, or why decode has given up before the request came. The newest word about a room counts.

    len(unclaimed): how many rooms. Beyond `most` of them the oldest is forgotten.
    """

    def __init__(self, most: int, patience_ns: int) -> None:
        self._most = most
        self._patience_ns = patience_ns
        self._rooms: dict[int, _Entry] = {}  # by age

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def next_ns(self) -> int | None:
        """When the oldest word is to be forgotten."""
        return next(iter(self._rooms.values())).until_ns if self._rooms else None

    def note(self, room: int, body: EarlyWant | Refuse | str, now_ns: int) -> None:
        """Keep `body` as the newest word about `room`."""
        self._rooms.pop(room, None)
        while len(self._rooms) >= self._most:
            del self._rooms[next(iter(self._rooms))]
        self._rooms[room] = _Entry(body, now_ns + self._patience_ns)

    def early(self, room: int) -> EarlyWant | None:
        """The Want that waits for the request of `room`."""
        entry = self._rooms.get(room)
        return entry.body if entry is not None and isinstance(entry.body, EarlyWant) else None

    def refusal(self, room: int) -> Refuse | None:
        """The answer to a Want for `room`, if its request has come and gone."""
        entry = self._rooms.get(room)
        return entry.body if entry is not None and isinstance(entry.body, Refuse) else None

    def claim(self, room: int) -> EarlyWant | str | None:
        """The request of `room` has come: the Want that waits for it, or why decode has given up, or None."""
        entry = self._rooms.pop(room, None)
        return None if entry is None or isinstance(entry.body, Refuse) else entry.body

    def forget(self, instance: str) -> None:
        """An instance is gone: so are its Wants."""
        for room in list(self._rooms):
            early = self.early(room)
            if early is not None and early.card.instance == instance:
                del self._rooms[room]

    def expire(self, now_ns: int) -> list[EarlyWant]:
        """Forget what is too old; returns the Wants among it."""
        stale: list[EarlyWant] = []
        while self._rooms:
            room, entry = next(iter(self._rooms.items()))
            if entry.until_ns > now_ns:
                break
            del self._rooms[room]
            if isinstance(entry.body, EarlyWant):
                stale.append(entry.body)
        return stale
