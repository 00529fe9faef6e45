"""The exchange of tokens between hosts: Mooncake's transfer engine writes messages into the receiver's memory.

Every rank registers once the boxes in which it receives, two for each other rank, and tells all where they are. A
message is one contiguous write (a write for each row would take a hundred times as long), and when that has arrived, a
second one of two words says how long it is. Nobody coordinates: a receiver looks at those words.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from sgl_kernel.exchange import CarriedMailboxes
from sgl_kernel.ranks import RankLostError

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import PeerError
from moonlang.base.process_memory import TAG_BYTES, Doorplate
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.moe.exchange.mailboxes import MailboxExchange
from moonlang.moe.exchange.port import ExchangeSpec
from moonlang.mooncake.engine import MAX_ENTRY_BYTES, Engine, Peer
from moonlang.mooncake.wheel import DONE, FAILED

_PATIENCE_S: Final = 30.0  # a rank that lives computes the same layer meanwhile
_NAP_S: Final = 100e-6  # others need the core to carry what is waited for
_CARD_BYTES: Final = 512
_LINE: Final = 64
_WORDS: Final = _LINE // 8
_PAGE: Final = 4096


class _Card(msgspec.Struct, frozen=True):
    """What the others must know to write to a rank. boxes, lines: addresses of its memory, by lane."""

    session: str
    tag: bytes
    boxes: list[int]
    lines: list[int]


@dataclass(slots=True)
class _Letter:
    """A message on its way. body: handles of its writes; announced: of the write that says that it is there, for whose
    end nobody waits before the next round."""

    to: int
    size: int
    body: list[int]
    announced: int | None = None


class _Inbox:
    """Where the messages of all others arrive: boxes [from][2], and a line for each that says what it holds."""

    def __init__(self, size: int, box_bytes: int) -> None:
        self._box_bytes = -(-box_bytes // _PAGE) * _PAGE
        self.boxes = np.zeros(size * 2 * self._box_bytes, np.uint8)
        self.lines = np.zeros((size, 2, _WORDS), np.uint64)

    def register(self, engine: Engine) -> None:
        for memory in (self.boxes, self.lines):
            engine.register(memory.ctypes.data, memory.nbytes)

    def offset(self, sender: int, turn: int) -> int:
        """Of a box."""
        return (sender * 2 + turn % 2) * self._box_bytes

    def line_offset(self, sender: int, turn: int) -> int:
        return (sender * 2 + turn % 2) * _LINE

    def message(self, sender: int, turn: int) -> NDArray[np.uint8] | None:
        """The message of that round, None when it has not come."""
        word, check = self.lines[sender, turn % 2, :2].tolist()
        if word >> 40 != turn & 0xFFFFFF or check != word ^ _ALL:
            return None
        begin = self.offset(sender, turn)
        return self.boxes[begin : begin + (word & _SIZE)]


_ALL: Final = (1 << 64) - 1
_SIZE: Final = (1 << 40) - 1


def _word(turn: int, size: int) -> int:
    """Of a line: the round, and the size of the message."""
    return (turn & 0xFFFFFF) << 40 | size


class _Lane:
    """The messages of one exchange. Its methods are called by the kernels, in the thread that runs the model."""

    def __init__(
        self, rank: int, lane: int, engine: Engine, plate: Doorplate, inbox: _Inbox, patience_s: float
    ) -> None:
        """plate: is read by the others as long as they write here."""
        self._rank, self._lane = rank, lane
        self._plate = plate
        self._engine = engine
        self._inbox = inbox
        self._patience_ns = int(patience_s * NS_PER_S)
        self._turn = 0
        self._lines = np.zeros((len(inbox.lines), 2, _WORDS), np.uint64)  # that are written to the others
        self._cards: list[_Card] = []
        self._peers: list[Peer] = []
        self._announced: list[_Letter] = []  # of the round before

    def meet(self, cards: list[_Card], peers: list[Peer], outbox: NDArray[np.uint8]) -> None:
        """outbox: memory of all messages that go out."""
        self._cards, self._peers = cards, peers
        for memory in (outbox, self._lines):
            self._engine.register(memory.ctypes.data, memory.nbytes)

    def post(self, letters: list[NDArray[np.uint8] | None]) -> None:
        self._turn += 1
        try:
            sent = [self._take_off(to, letter) for to, letter in enumerate(letters) if letter is not None]
            flying = [*self._announced, *sent]
            self._announced = sent
            deadline_ns = monotonic_ns() + self._patience_ns
            while flying:
                left = [letter for letter in flying if not self._arrived(letter)]
                if len(left) == len(flying):
                    if monotonic_ns() > deadline_ns:
                        raise PeerError(f"Rank {left[0].to} does not take its tokens.")
                    sleep_s(_NAP_S)
                flying = left
        except PeerError as lost:
            raise RankLostError(lost.message) from lost

    def take(self, sender: int) -> NDArray[np.uint8]:
        deadline_ns = monotonic_ns() + self._patience_ns
        while (message := self._inbox.message(sender, self._turn)) is None:
            if monotonic_ns() > deadline_ns:
                raise RankLostError(f"Rank {sender} has not answered for {self._patience_ns / NS_PER_S:g} s")
            sleep_s(_NAP_S)
        return message

    def _take_off(self, to: int, letter: NDArray[np.uint8]) -> _Letter:
        card, size = self._cards[to], letter.nbytes
        target = card.boxes[self._lane] + self._inbox.offset(self._rank, self._turn)
        handles = [
            self._engine.submit(self._peers[to], letter.ctypes.data + at, target + at, min(MAX_ENTRY_BYTES, size - at))
            for at in range(0, size, MAX_ENTRY_BYTES)
        ]
        return _Letter(to, size, handles)

    def _arrived(self, letter: _Letter) -> bool:
        """See on with it: announce it when its body is there."""
        letter.body = [handle for handle in letter.body if not self._ended(handle, letter.to)]
        if letter.body:
            return False
        if letter.announced is None:
            word = _word(self._turn, letter.size)
            line = self._lines[letter.to, self._turn % 2]
            line[:2] = word, word ^ _ALL
            target = self._cards[letter.to].lines[self._lane] + self._inbox.line_offset(self._rank, self._turn)
            letter.announced = self._engine.submit(self._peers[letter.to], line.ctypes.data, target, 16)
            return True
        return self._ended(letter.announced, letter.to)

    def _ended(self, handle: int, to: int) -> bool:
        status = self._engine.status(handle)
        if status == FAILED:
            raise PeerError(f"Rank {to} has ended, or cannot be reached.")
        return status == DONE


def open_between_hosts(spec: ExchangeSpec, seat: Seat, group: Group, engine: Engine) -> MailboxExchange:
    """The exchange over `engine`, which is closed with it. PeerError when the others cannot be reached."""
    tag = secrets.token_bytes(TAG_BYTES)
    plate = Doorplate(tag)
    engine.register(plate.address, TAG_BYTES)
    patience_s = min(seat.patience_s, _PATIENCE_S)
    inboxes = [_Inbox(seat.size, spec.box_bytes) for _ in range(spec.lanes)]
    for inbox in inboxes:
        inbox.register(engine)
    lanes = [_Lane(seat.rank, lane, engine, plate, inbox, patience_s) for lane, inbox in enumerate(inboxes)]
    boxes = [
        CarriedMailboxes(seat.rank, seat.size, box_bytes=spec.box_bytes, post=lane.post, take=lane.take)
        for lane in lanes
    ]
    addresses = [inbox.boxes.ctypes.data for inbox in inboxes], [inbox.lines.ctypes.data for inbox in inboxes]
    cards = _cards(_Card(engine.session(plate.address), tag, *addresses), group)
    peers = [Peer(card.session, card.tag) for card in cards]
    for rank, peer in enumerate(peers):
        if rank != seat.rank:
            engine.reach(peer)
    for lane, one in zip(lanes, boxes, strict=True):
        lane.meet(cards, peers, one.memory())
    return MailboxExchange(spec, boxes, engine.close)


def _cards(mine: _Card, group: Group) -> list[_Card]:
    """Of all ranks."""
    packed = msgspec.msgpack.encode(mine)
    padded = torch.zeros(_CARD_BYTES, dtype=torch.uint8)
    padded[: len(packed) + 2] = torch.tensor(list(len(packed).to_bytes(2, "little") + packed), dtype=torch.uint8)
    found: list[Any] = [bytes(one.numpy()) for one in group.all_gather(padded)]
    sizes = [int.from_bytes(one[:2], "little") for one in found]
    return [msgspec.msgpack.decode(one[2 : 2 + n], type=_Card) for one, n in zip(found, sizes, strict=True)]
