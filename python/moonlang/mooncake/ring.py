"""Frames from one writer to its readers through one piece of memory that all see; no locks, no system calls.

    header of every reader | ring of frames | arena of large bodies

Positions only grow; where something lies is its position modulo the size of its part. The writer stores a frame, then
the position behind it; the reader reads up to there, then stores how far it has come: these stores are the credits
that the writer may use up, so memory is bounded by the geometry. A frame is a word (kind and size), then its content
padded to words, and never wraps: the end of the ring is skipped. A message too large for a frame lies in the arena,
in one block or in several parts one after the other, and the frame says where; the block is the reader's until the
message is decoded. Mostly there is one reader; where there are several, each gets every message, and what the last of
them has read may be used again.

Words are stored and loaded whole (a memoryview of format Q copies them in one instruction), and in order: x86-64 keeps
the order of stores and of loads. What it does not keep is a store before a later load: see `fence`.

Everything that is read here was written by another process: sizes and positions are checked against the geometry
before they are used, and `RingError` ends the connection.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from moonlang.base.errors import ConfigError, PeerError

HEADER_BYTES: Final = 256  # of each reader
WORD: Final = 8
INLINE_BYTES: Final = 8192  # larger messages go through the arena
READ_BYTES: Final = 256 << 10  # a read ends behind so much from the arena: what is decoded fits into a cache

# Words of a header, each in the cache line of whoever writes it.
PRODUCED: Final = 0  # position behind the last complete frame; the writer's; only in the first header
CONSUMED: Final = 8  # position behind the last frame that was read; the reader's
RELEASED: Final = 9  # the same of the arena
READER_SLEEPS: Final = 16  # set by the reader, taken back by the writer, who then rings
WRITER_WAITS: Final = 24  # set by the writer, taken back by the reader, who then rings

_SKIP: Final = 1  # nothing up to the end of the ring
_INLINE: Final = 2  # a message
_BLOCK: Final = 3  # a Reference to a message in the arena
_PART: Final = 4  # a Reference to a part of one
_KIND_SHIFT: Final = 32
_SIZE_MASK: Final = (1 << _KIND_SHIFT) - 1
_INLINE_TAG: Final = _INLINE << _KIND_SHIFT
_HEADER_WORDS: Final = HEADER_BYTES // WORD
_REFERENCE: Final = struct.Struct("<QQQQQ")  # position and size in the arena, offset in and size of the message, sum

_barrier = threading.Lock()
_take_barrier, _leave_barrier = _barrier.acquire, _barrier.release  # half the time of a `with`


class RingError(PeerError):
    """What lies in the memory cannot have been written by an honest peer."""


class LandingError(Exception):
    """A body of `size` bytes that is referred to has not arrived yet: its checksum does not fit. Try again soon."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes have not arrived.")
        self.size = size


def fence() -> None:
    """All stores of this thread before are seen by others before any load after: taking a lock is a full barrier.

    Who announces that it will sleep and who looks whether somebody sleeps each store one word and then load the
    other's. Without this both may see the old value, and a bell is never rung.
    """
    _take_barrier()
    _leave_barrier()


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes, powers of two. Arena memory is only taken when large messages travel."""

    ring_bytes: int = 1 << 20
    arena_bytes: int = 8 << 20
    readers: int = 1

    def check(self) -> None:
        """ConfigError unless a ring of these sizes can work."""
        for size, low in ((self.ring_bytes, 2 * INLINE_BYTES), (self.arena_bytes, 4 * INLINE_BYTES)):
            if size & (size - 1) or not low <= size <= 1 << 32:
                raise ConfigError(f"{size} bytes are no power of two between {low} and {1 << 32}.")

    @property
    def total_bytes(self) -> int:
        return self.start + self.ring_bytes + self.arena_bytes

    @property
    def start(self) -> int:
        """Of the ring."""
        return HEADER_BYTES * self.readers

    def word(self, word: int, slot: int) -> int:
        """Where reader `slot` has that word of the header."""
        return word + slot * _HEADER_WORDS

    @property
    def piece_bytes(self) -> int:
        """The largest block of the arena; larger messages are cut."""
        return self.arena_bytes // 4


DEFAULT_GEOMETRY: Final = Geometry()


@dataclass(frozen=True, slots=True)
class Block:
    """A body in the arena, for writers whose reader does not see their memory. position: of its frame in the ring."""

    position: int
    offset: int  # from the start of the memory
    size: int


class Writer:
    """The writing side. checksum: of every body in the arena, for the reader to see whether it has arrived."""

    def __init__(
        self, memory: memoryview, geometry: Geometry, checksum: Callable[[memoryview], int] | None = None
    ) -> None:
        self.words = memory.cast("Q")
        self.position = 0
        self.blocks: list[Block] = []  # only with checksums; taken away by whoever sends them
        self._bytes = memory
        self._ring_bytes = geometry.ring_bytes
        self._arena_bytes = geometry.arena_bytes
        self._start = geometry.start
        self._arena_start = geometry.start + geometry.ring_bytes
        self._piece_bytes = geometry.piece_bytes
        self._slots = range(0, geometry.readers * _HEADER_WORDS, _HEADER_WORDS)
        self._checksum = checksum
        self._consumed = 0
        self._arena_position = 0
        self._arena_floor = 0  # below it nothing is in use, whatever the reader says

    @property
    def unread(self) -> bool:
        """Not all frames have been read."""
        return any(self.words[CONSUMED + slot] != self.position for slot in self._slots)

    def put(self, message: bytearray | bytes) -> bool:
        """Store a message of at most INLINE_BYTES; False when there is no room for it."""
        size = len(message)
        need, at = (size + 15) & ~7, self.position
        offset = at % self._ring_bytes
        if offset + need <= self._ring_bytes and at + need - self._consumed <= self._ring_bytes:
            start = self._start + offset  # as `_room` would find; most of the time this is all
        else:
            start = self._room(size)
            if not start:
                return False
        words = self.words
        words[start >> 3] = _INLINE_TAG | size
        start += WORD
        self._bytes[start : start + size] = message
        self.position = words[PRODUCED] = self.position + need
        return True

    def put_large(self, message: bytearray | bytes) -> Iterator[bool]:
        """Store a message of any size, part by part: True when a part is stored, False when there is no room for it."""
        total = len(message)
        kind = _BLOCK if total <= self._piece_bytes else _PART
        view = memoryview(message)
        for at in range(0, total, self._piece_bytes):
            piece = view[at : at + self._piece_bytes]
            while not self._put_piece(kind, piece, at, total):
                yield False
            yield True

    def _put_piece(self, kind: int, piece: memoryview, at: int, total: int) -> bool:
        """One piece in the arena, and its frame."""
        size = len(piece)
        position = self._arena_position
        released = min(self.words[RELEASED + slot] for slot in self._slots)
        if released == position:  # empty: begin at the start, which the caches know
            self._arena_floor = position = -(-position // self._arena_bytes) * self._arena_bytes
        released = max(released, self._arena_floor)
        offset = position % self._arena_bytes
        if offset + size > self._arena_bytes:
            position += self._arena_bytes - offset
            offset = 0
        start = self._room(_REFERENCE.size) if position + size - released <= self._arena_bytes else 0
        if not start:
            return False
        body = self._arena_start + offset
        self._bytes[body : body + size] = piece
        checksum = 0
        if self._checksum is not None:
            checksum = self._checksum(piece)
            self.blocks.append(Block(self.position, body, size))
        self.words[start >> 3] = kind << _KIND_SHIFT | _REFERENCE.size
        _REFERENCE.pack_into(self._bytes, start + WORD, position, size, at, total, checksum)
        self._arena_position = -(-(position + size) // WORD) * WORD
        self._publish(_REFERENCE.size)
        return True

    def _room(self, size: int) -> int:
        """Where a frame with `size` bytes of content may begin; 0: nowhere yet. Skips the end of the ring."""
        need = (size + 15) & ~7
        at = self.position
        offset = at % self._ring_bytes
        left = self._ring_bytes - offset
        needed = need if need <= left else left + need
        if at + needed - self._consumed > self._ring_bytes:
            consumed = min(self.words[CONSUMED + slot] for slot in self._slots)
            if not self._consumed <= consumed <= at:
                raise RingError(f"The reader claims to be at {consumed}, between {self._consumed} and {at}.")
            self._consumed = consumed
            if at + needed - consumed > self._ring_bytes:
                return 0
        if need > left:
            self.words[(self._start + offset) >> 3] = _SKIP << _KIND_SHIFT
            self.position = at + left
            offset = 0
        return self._start + offset

    def _publish(self, size: int) -> None:
        self.position += (size + 15) & ~7
        self.words[PRODUCED] = self.position

    def release(self) -> None:
        """Let go of the memory."""
        self.words.release()
        self._bytes.release()


class Reader:
    """The reading side. max_bytes: of one message. checksum: as the writer's. slot: which reader this is."""

    def __init__(
        self,
        memory: memoryview,
        geometry: Geometry,
        max_bytes: int,
        checksum: Callable[[memoryview], int] | None = None,
        slot: int = 0,
    ) -> None:
        self.words = memory.cast("Q")
        self.position = 0
        self.released = 0
        self.left = False  # the last read has left something, for its caller to come back
        self._consumed_word = geometry.word(CONSUMED, slot)
        self._released_word = geometry.word(RELEASED, slot)
        self._bytes = memory
        self._ring_bytes = geometry.ring_bytes
        self._arena_bytes = geometry.arena_bytes
        self._start = geometry.start
        self._arena_start = geometry.start + geometry.ring_bytes
        self._piece_bytes = geometry.piece_bytes
        self._max_bytes = max_bytes
        self._checksum = checksum
        self._partial = bytearray()  # the first parts of a message
        self._large_bytes = 0  # read from the arena by this `read`

    def has_more(self) -> bool:
        return self.words[PRODUCED] != self.position

    def read(self, most: int, deliver: Callable[[memoryview | bytearray], bool]) -> int:
        """Hand up to `most` messages to `deliver`, which must not keep what it is given and says whether it counts.

        Fewer when they are large: see READ_BYTES. The number of those that count.
        RingError, LandingError: what came before is delivered, nothing is twice.
        """
        words, data = self.words, self._bytes
        produced = words[PRODUCED]
        at = self.position
        self.left = False
        if produced == at:
            return 0
        if not 0 < produced - at <= self._ring_bytes:
            raise RingError(f"The writer claims to be at {produced}, the reader is at {at}.")
        count = 0
        credit_at = at + self._ring_bytes // 4
        self._large_bytes = 0
        try:
            while at != produced and count < most and self._large_bytes < READ_BYTES:
                start = self._start + at % self._ring_bytes
                word = words[start >> 3]
                size = word & _SIZE_MASK
                end = start + WORD + size
                if word >> _KIND_SHIFT == _INLINE:
                    self._check_frame(at, size, INLINE_BYTES, produced)
                    at += (size + 15) & ~7
                    count += deliver(data[start + WORD : end])
                elif word == _SKIP << _KIND_SHIFT:
                    at += self._ring_bytes - at % self._ring_bytes
                    if at > produced:
                        raise RingError("A skip leads beyond the last frame.")
                else:
                    self._check_frame(at, size, _REFERENCE.size, produced)
                    count += self._read_large(word >> _KIND_SHIFT, start + WORD, size, deliver)
                    at += (size + 15) & ~7
                if at >= credit_at:
                    words[self._consumed_word] = at
                    credit_at = at + self._ring_bytes // 4
        finally:
            self.position = words[self._consumed_word] = at
        self.left = at != produced
        return count

    def _check_frame(self, at: int, size: int, most: int, produced: int) -> None:
        need = (size + 15) & ~7
        if size > most or need > produced - at or at % self._ring_bytes + need > self._ring_bytes:
            raise RingError(f"A frame of {size} bytes at {at} does not fit.")

    def _read_large(self, kind: int, start: int, size: int, deliver: Callable[[memoryview | bytearray], bool]) -> bool:
        if kind not in (_BLOCK, _PART) or size != _REFERENCE.size:
            raise RingError(f"A frame of kind {kind} with {size} bytes is unknown.")
        position, length, at, total, checksum = _REFERENCE.unpack_from(self._bytes, start)
        offset = position % self._arena_bytes
        if (
            not 0 < length <= self._piece_bytes
            or offset + length > self._arena_bytes
            or not self.released <= position <= self.released + 2 * self._arena_bytes
            or not at + length <= total <= self._max_bytes
            or (kind == _BLOCK and length != total)
        ):
            raise RingError(f"A frame refers to {length} bytes at {position} of the arena, {at} of {total}.")
        body = self._bytes[self._arena_start + offset : self._arena_start + offset + length]
        if self._checksum is not None and self._checksum(body) != checksum:
            raise LandingError(length)
        counts = False
        try:
            if kind == _BLOCK:
                self._partial.clear()
                counts = deliver(body)
            else:
                counts = self._add_part(body, at, total, deliver)
        finally:
            body.release()
            self._large_bytes += length
            self.released = -(-(position + length) // WORD) * WORD
            self.words[self._released_word] = self.released
        return counts

    def _add_part(
        self, body: memoryview, at: int, total: int, deliver: Callable[[memoryview | bytearray], bool]
    ) -> bool:
        """A writer that gave up half-way begins its next message at 0: the parts before are forgotten."""
        if at == 0:
            self._partial = bytearray()
        if at != len(self._partial):
            raise RingError(f"A part begins at {at}, after {len(self._partial)} bytes.")
        self._partial += body
        if len(self._partial) < total:
            return False
        message, self._partial = self._partial, bytearray()
        return deliver(message)

    def release(self) -> None:
        """Let go of the memory."""
        self.words.release()
        self._bytes.release()
