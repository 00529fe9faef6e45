"""The decode half: lease pages for a prompt, ask its prefill instance for them, verify what lands, go on from there.

A room is one pair seen from here. Its request waits in PAIRING until the prefill instance is found and there is memory
for it, then in LANDING with a lease that the peer writes to; only pages that the own cache lacks are asked for. When
every push has been verified against its checksum and all of them cover all pages, the first token is delivered and the
request is LANDED: it has its whole prompt in its lease and needs a slot, nothing else.

When anything goes wrong the peer may still write. The pages are quarantined until it says that it is drained, or its
process is gone; the request starts again here (fallback) or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moonlang.base.errors import BugError
from moonlang.core import layout
from moonlang.core.kv import unsharded
from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.messages import TokenDelta
from moonlang.core.page_key import prompt_key
from moonlang.core.pairing import (
    NO_TOKEN,
    Drained,
    Heard,
    KvCard,
    Landed,
    Linked,
    Lost,
    PairEvent,
    PairMessage,
    Pushed,
    Refuse,
    Release,
    Unreachable,
    Verify,
    Want,
)
from moonlang.core.plan import Row, RowResult
from moonlang.core.request import Finish, Handover, Request, State
from moonlang.core.ticket import Completion, Outcome
from moonlang.scheduler.pair_side import Accept, Alarm, End, Mail, peer_of, room_in_use
from moonlang.scheduler.partings import Parting, Partings
from moonlang.scheduler.roster import Roster, lease_of
from moonlang.scheduler.settings import NS_PER_MS, PairingConfig, PairStats

_RETRYABLE = 503
_SELDOM = 5  # so many times later a Want is said again that has been answered

_Run = tuple[str, int, tuple[int, ...]]  # instance, node of the tree, tokens behind it


@dataclass(slots=True, kw_only=True)
class _Room:
    """One pair. card: the prefill instance, once found; want: what it was asked for, once there were pages.

    pushes: those heard of, by index; unverified: index by number of the Verify under way.
    """

    request: Request
    number: int
    serial: int
    entered_ns: int
    deadline_ns: int
    card: KvCard | None = None
    want: Want | None = None
    wanted_ns: int = 0
    pushes: dict[int, Pushed] = field(default_factory=dict)
    unverified: dict[int, int] = field(default_factory=dict)
    landed: Landed | None = None
    repeat_ns: int = 0

    def is_with(self, card: KvCard, serial: int) -> bool:
        """Whether a message is of this pair, not of another instance or of an earlier use of the room."""
        return self.card is not None and self.card.instance == card.instance and self.serial == serial


class DecodeSide:
    """See `PairSide` for the methods."""

    def __init__(self, config: PairingConfig, roster: Roster, end: End, accept: Accept) -> None:
        self.mail = Mail()
        self.leases: list[Lease] = []  # all of them are in the roster, or quarantined
        self._config = config
        self._roster = roster
        self._end = end
        self._accept = accept
        self._regions = config.card.regions
        self._digest = unsharded(self._regions).digest()
        self._page_bytes = sum(region.schema.page_bytes for region in self._regions)
        self._rooms: dict[int, _Room] = {}
        self._queue: dict[int, _Room] = {}  # found, and waiting for memory
        self._coming: dict[_Run, int] = {}  # tokens that are being sent -> room
        self._room_of: dict[int, int] = {}  # by number of a Verify under way
        self._alarm = Alarm()
        self._partings = Partings(roster.memory, self.mail, self._alarm, config.repeat_ns)
        self._now_ns = 0
        self._serial = 0
        self._paired = self._pairing_ns = self._moved = self._moving_ns = self._bytes = 0
        self._failed = self._fallbacks = 0

    # ---- requests

    def enter(self, request: Request, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        peer = peer_of(request)
        number, deadline_ns = peer.room, self._deadline_ns(request)
        if number in self._rooms or number in self._partings:
            return [self._end(request, room_in_use(number), None)]
        self._serial += 1
        self._rooms[number] = _Room(
            request=request, number=number, serial=self._serial, entered_ns=now_ns, deadline_ns=deadline_ns
        )
        self._alarm.set(deadline_ns)
        self.mail.open(peer, deadline_ns)
        return []

    def leave(self, request: Request, finish: Finish, lease: Lease | None) -> None:
        room = self._rooms.get(peer_of(request).room)
        if room is not None and room.request is request:
            self._failed += 1
            self._part(room, finish.message)

    def expire(self, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        if not self._alarm.rings(now_ns):
            return []
        deltas: list[TokenDelta] = []
        for room in list(self._rooms.values()):
            if now_ns >= room.deadline_ns:
                deltas += self._fail(room, f"The prefill instance did not answer in time (room {room.number}).")
            else:
                self._ask(room)
        self._partings.expire(now_ns)
        return deltas

    def _deadline_ns(self, request: Request) -> int:
        """Until when to wait for the next answer."""
        patience_ns = self._now_ns + self._config.patience_ns
        return patience_ns if request.deadline_ns is None else min(request.deadline_ns, patience_ns)

    # ---- asking for pages

    def reserve(self, now_ns: int) -> list[TokenDelta]:
        """In the order of urgency, as far as memory reaches; requests that start again here go first."""
        self._now_ns = now_ns
        if self._roster.waiting:
            return []
        for room in sorted(self._queue.values(), key=self._urgency):
            request = room.request
            prefix = self._roster.memory.cache.match(request.prompt, request.extra_key, request.prompt_len)
            run = self._run(room, prefix)
            if run is not None and run in self._coming:
                continue  # the same peer sends these very tokens: take them from the cache a little later
            if not self._lease(room, prefix):
                break
            if run is not None:
                self._coming[run] = room.number
        return []

    def _run(self, room: _Room, prefix: PrefixRef) -> _Run | None:
        """Names the tokens that a peer is to send, if they are worth waiting for when another request has asked."""
        key = self._roster.prefix_key(room.request, prefix)
        return None if key is None or room.card is None else (room.card.instance, *key)

    def _urgency(self, room: _Room) -> tuple[int, int]:
        config = self._roster.config
        sign = 0 if not config.priority else 1 if config.priority_low_first else -1
        return sign * room.request.priority, room.request.order

    def _lease(self, room: _Room, prefix: PrefixRef) -> bool:
        """Take pages for the prompt and ask for those that the cache lacks; False when there is no room."""
        roster, request, memory = self._roster, room.request, self._roster.memory
        holders = len(roster.running) + len(roster.arriving)
        if holders >= roster.config.max_running + self._config.extra_leases:
            return False
        lease = memory.open(prefix)
        fits = not holders or roster.has_room(request, lease, memory.available_pages)
        if not (fits and memory.grow(lease, request.prompt_len)):
            memory.close(lease, None)
            return False
        request.lease, request.state = lease, State.LANDING
        roster.arriving[request.rid] = request
        del self._queue[room.number]
        room.wanted_ns = self._now_ns
        room.deadline_ns = self._deadline_ns(request)
        room.want = Want(
            room=room.number,
            prompt_len=request.prompt_len,
            key=prompt_key(request.prompt, request.extra_key),
            first_page=lease.shared,
            pages=tuple(lease.pages[lease.shared :]),
            patience_ms=-(-(room.deadline_ns - self._now_ns) // NS_PER_MS),
            serial=room.serial,
        )
        self._paired += 1
        self._pairing_ns += self._now_ns - room.entered_ns
        self._ask(room)
        return True

    def _ask(self, room: _Room) -> None:
        """Say Want when nothing has been heard for a while: it may have been lost, and so may a Refuse after Noted."""
        self._alarm.set(room.deadline_ns)
        if room.want is None or room.card is None:
            return
        if self._now_ns >= room.repeat_ns:
            self.mail.send(room.card.instance, room.want)
            room.repeat_ns = self._now_ns + self._config.repeat_ns
        self._alarm.set(room.repeat_ns)

    # ---- what comes back

    def heard(self, event: PairEvent, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        match event:
            case Linked(number, card):
                return self._linked(number, card)
            case Unreachable(number, error):
                room = self._rooms.get(number)
                return self._fail(room, error) if room is not None and room.card is None else []
            case Heard(card, body):
                room = self._rooms.get(body.room)
                if room is not None and room.is_with(card, body.serial):
                    room.repeat_ns = now_ns + _SELDOM * self._config.repeat_ns
                    return self._answered(room, body)
                self._partings.heard(card, body, now_ns)
                return []
            case Lost(instance, fate):
                return self._lost(instance, gone=fate == "gone")

    def _linked(self, number: int, card: KvCard) -> list[TokenDelta]:
        room = self._rooms.get(number)
        if room is None:  # its request has ended meanwhile: the peer need not wait for it
            self.mail.send(card.instance, Release(number, "The request has ended at its decode instance."))
            return []
        if room.card is not None:
            return []
        room.card = card
        error = layout.mismatch(card.regions, self._regions)
        if error:
            return self._fail(room, error)
        self._queue[number] = room
        return []

    def _answered(self, room: _Room, body: PairMessage) -> list[TokenDelta]:
        match body:
            case Pushed():
                return self._pushed(room, body)
            case Landed():
                room.landed = body
                return self._complete(room)
            case Refuse(_, error, status):
                return self._fail(room, error, status)
            case Drained():
                return self._fail(room, "The prefill instance does not know of this request any more.")
            case _:
                return []

    def _pushed(self, room: _Room, pushed: Pushed) -> list[TokenDelta]:
        """Part of the pages has landed: have it verified."""
        want = room.want
        if want is None or pushed.index in room.pushes:
            return []
        if not layout.fits(pushed, len(want.pages), self._regions):
            return self._fail(room, "The prefill instance has written beyond the pages that were wanted.")
        room.pushes[pushed.index] = pushed
        if not self._config.verify:
            return self._complete(room)
        pages = want.pages[pushed.at : pushed.at + pushed.count]
        number = self.mail.submit(Verify(room=room.number, pages=pages, spans=pushed.spans, rank=pushed.rank))
        room.unverified[number] = pushed.index
        self._room_of[number] = room.number
        return []

    def transferred(self, number: int, completion: Completion, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        at = self._room_of.pop(number)
        room = self._rooms.get(at)
        if room is None or number not in room.unverified:
            self._partings.verified(at, number)
            return []
        pushed = room.pushes[room.unverified.pop(number)]
        if completion.outcome is not Outcome.OK:
            return self._fail(room, f"KV pages could not be verified: {completion.error}")
        if completion.value != pushed.checksum:
            return self._fail(room, "KV pages have arrived with a wrong checksum.")
        return self._complete(room)

    def _complete(self, room: _Room) -> list[TokenDelta]:
        """Once everything has landed and is verified the request goes on by itself."""
        landed, want = room.landed, room.want
        if landed is None or want is None or room.unverified or len(room.pushes) < landed.pushes:
            return []
        error = self._flaw(room, landed, want)
        if error:
            return self._fail(room, error)
        request, roster = room.request, self._roster
        self._moved += 1
        self._moving_ns += self._now_ns - room.wanted_ns
        self._bytes += len(want.pages) * self._page_bytes
        self._close(room, "", [])
        request.state = State.LANDED
        request.admitted_ns = self._now_ns
        request.cached_tokens = landed.cached_tokens
        request.host_tokens, request.storage_tokens = landed.host_tokens, landed.storage_tokens
        request.tier_miss = landed.tier_miss
        request.handover = Handover(
            pairing_ns=room.wanted_ns - room.entered_ns,
            moving_ns=self._now_ns - room.wanted_ns,
            queue_ns=landed.queue_ns,
            compute_ns=landed.compute_ns,
            tokens=len(want.pages) * roster.config.page_size,
        )
        roster.totals.prompt_tokens += request.prompt_len
        roster.totals.cached_tokens += want.first_page * roster.config.page_size
        if request.logprob is not None:  # those of the prompt are told by prefill
            request.logprob = msgspec.structs.replace(request.logprob, start=-1)
        roster.memory.share(lease_of(request), request.tokens, request.prompt_len, request.extra_key, None)
        tokens = () if landed.token == NO_TOKEN else (landed.token,)
        delta = self._accept(request, RowResult(-1, -1, tokens, landed.output, ended=landed.ended))
        return [delta] if delta is not None else []

    def _flaw(self, room: _Room, landed: Landed, want: Want) -> str:
        """Why what has landed cannot be used; empty when it can."""
        if landed.key != want.key or landed.digest != self._digest:
            return "The prefill instance has computed another prompt, or with another model."
        if (landed.token == NO_TOKEN) != (room.request.remaining == 0) or landed.token < NO_TOKEN:
            return "The prefill instance has sent no first token."
        if len(room.pushes) != landed.pushes or not layout.covered(
            room.pushes.values(), len(want.pages), self._regions
        ):
            return "The prefill instance has not sent every page."
        return ""

    def _lost(self, instance: str, *, gone: bool) -> list[TokenDelta]:
        """Nobody answers any more."""
        deltas: list[TokenDelta] = []
        for room in [r for r in self._rooms.values() if r.card is not None and r.card.instance == instance]:
            deltas += self._fail(room, "The prefill instance is out of reach.")
        self._partings.lost(instance, gone=gone)
        return deltas

    # ---- how a room ends

    def _fail(self, room: _Room, error: str, status: int = _RETRYABLE) -> list[TokenDelta]:
        """The one place where a pair fails: start again here, where that is allowed and may help, or end."""
        request = room.request
        if not (self._config.fallback and status == _RETRYABLE):
            return [self._end(request, Finish("abort", message=error, status=status), None)]
        self._failed += 1
        self._fallbacks += 1
        self._part(room, error)
        request.peer, request.state = None, State.WAITING
        self._roster.prefetch(request, self._now_ns)
        self._roster.waiting.append(request)
        return []

    def _part(self, room: _Room, error: str) -> None:
        """Take the request out of the room: its pages into quarantine, the peer is told."""
        request, pages = room.request, []
        if request.lease is not None:
            del self._roster.arriving[request.rid]
            pages = self._roster.memory.quarantine(request.lease)
            request.lease = None
        self._close(room, error or "The request has ended.", pages)

    def _close(self, room: _Room, error: str, pages: list[int]) -> None:
        self._coming = {run: number for run, number in self._coming.items() if number != room.number}
        del self._rooms[room.number]
        self._queue.pop(room.number, None)
        if room.card is None:
            return
        parting = Parting(
            room=room.number,
            serial=room.serial,
            instance=room.card.instance,
            error=error,
            pages=pages,
            verifies=list(room.unverified),
            until_ns=room.deadline_ns,
        )
        self._partings.add(parting, self._now_ns)

    # ---- plans are as always

    def progress(self, plan_id: int, layers: int) -> None:
        pass

    def lay(self, plan_id: int, rows: Sequence[Row]) -> int:
        return 0

    def computed(self, request: Request, outcome: RowResult) -> None:
        raise BugError(f"Request {request.rid} is bound to a peer of a decode instance.")

    def committed(self, plan_id: int, now_ns: int) -> list[TokenDelta]:
        return []

    # ---- for the scheduler and operators

    @property
    def wake_ns(self) -> int | None:
        return self._alarm.at_ns

    @property
    def holds_memory(self) -> bool:
        landing = any(room.want is not None for room in self._rooms.values())
        return landing or self._partings.num_pages > 0

    def stats(self) -> PairStats:
        moving = sum(room.want is not None for room in self._rooms.values())
        return PairStats(
            num_pairing=len(self._rooms) - moving,
            num_moving=moving,
            num_transfers=len(self._room_of),
            quarantined_pages=self._partings.num_pages,
            total_paired=self._paired,
            total_pairing_ns=self._pairing_ns,
            total_moved=self._moved,
            total_moving_ns=self._moving_ns,
            total_moved_bytes=self._bytes,
            total_failed=self._failed,
            total_fallbacks=self._fallbacks,
        )
