"""Which instance has the request of which room: what decode looks for and what prefill has. No sockets here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.core.pairing import PeerSpec
from moonlang.disaggregation.connection import Address

REFRESH_NS = 250 * NS_PER_MS  # a site whose rooms stay unfound is looked up again so often
AGAIN_NS = 200 * NS_PER_MS  # between two attempts to connect to one address
TROUBLE_NS = 500 * NS_PER_MS  # when nobody has answered for so long, the rooms of a site are given up
CLAIM_NS = 600 * NS_PER_S
MAX_CLAIMS = 1 << 16
MAX_SITES = 256  # kept without rooms to be found: clients may name any number of addresses
MAX_REFUSALS = 1024


@dataclass(frozen=True, slots=True)
class _Sought:
    deadline_ns: int
    since_ns: int


@dataclass(slots=True)
class Site:
    """What lies behind one bootstrap address: the listening addresses of its prefill instances.

    error: why it could not be looked up. trouble_ns: since when there is nobody to ask, 0 while there is; hopeless: it
    will not pass by itself.
    """

    addresses: tuple[Address, ...] = ()
    error: str = ""
    looking: bool = False
    looked_ns: int | None = None
    trouble_ns: int = 0
    hopeless: bool = False
    opens: dict[int, _Sought] = field(default_factory=dict)  # by room

    def due(self, now_ns: int) -> bool:
        """Whether to look it up now: nothing is known of it, or what is known does not lead to every room."""
        if self.looking or (self.looked_ns is not None and now_ns - self.looked_ns < REFRESH_NS):
            return False
        stale = any(now_ns - sought.since_ns >= REFRESH_NS for sought in self.opens.values())
        return not self.addresses or self.trouble_ns > 0 or stale

    def judge(self, *, up: bool, trying: bool, now_ns: int) -> None:
        """up: a connection to one of its instances stands; trying: one is being made."""
        if up:
            self.trouble_ns, self.hopeless = 0, False
        elif not self.trouble_ns and not (trying or self.looking):
            self.trouble_ns = now_ns


class Search:
    """Decode's side: rooms to be found, by the bootstrap address they came with."""

    def __init__(self) -> None:
        self._sites: OrderedDict[Address, Site] = OrderedDict()  # the one used last comes last
        self._site_of: dict[int, Address] = {}
        self._refusals: OrderedDict[Address, tuple[str, int]] = OrderedDict()  # by address of an instance: why, when

    def add(self, spec: PeerSpec, deadline_ns: int, now_ns: int) -> None:
        where = (spec.host, spec.port)
        site = self._sites.setdefault(where, Site())
        self._sites.move_to_end(where)
        self._forget_sites()
        if not site.opens:  # whatever was wrong may have passed
            site.trouble_ns, site.hopeless = 0, False
        site.opens[spec.room] = _Sought(deadline_ns, now_ns)
        self._site_of[spec.room] = where

    def end(self, room: int) -> bool:
        """The room has been found, or given up. False when it was not sought."""
        where = self._site_of.pop(room, None)
        if where is None:
            return False
        del self._sites[where].opens[room]
        return True

    def active(self) -> Iterator[tuple[Address, Site]]:
        """Sites with rooms to be found."""
        return ((where, site) for where, site in list(self._sites.items()) if site.opens)

    def found(self, where: Address, result: tuple[Address, ...] | str, now_ns: int) -> None:
        """A site has been looked up: its addresses, or why there are none."""
        site = self._sites.get(where)
        if site is None:
            return
        site.looking, site.looked_ns = False, now_ns
        if isinstance(result, str):
            site.error = result
        else:
            site.addresses, site.error = result, ""

    def refused(self, address: Address, text: str, now_ns: int) -> None:
        """A connection to an instance could not be made, or has ended."""
        self._refusals[address] = (text, now_ns)
        self._refusals.move_to_end(address)
        if len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)

    def may_dial(self, address: Address, now_ns: int) -> bool:
        refusal = self._refusals.get(address)
        return refusal is None or now_ns - refusal[1] >= AGAIN_NS

    def hopeless(self, address: Address) -> None:
        """The instance at `address` will not serve us: its sites are given up unless another one of theirs does."""
        for _, site in self.active():
            site.hopeless |= address in site.addresses

    def given_up(self, now_ns: int) -> list[tuple[int, str]]:
        """Rooms that will not be found, and why."""
        over: list[tuple[int, str]] = []
        for (host, port), site in self.active():
            trouble = site.trouble_ns and (site.hopeless or now_ns - site.trouble_ns >= TROUBLE_NS)
            text = self._explain(site)
            for room, sought in site.opens.items():
                if trouble or now_ns >= sought.deadline_ns:
                    over.append((room, f"No prefill instance for this request behind {host}:{port}. {text}"))
        return over

    def _forget_sites(self) -> None:
        if len(self._sites) > MAX_SITES:
            idle = [where for where, site in self._sites.items() if not site.opens]
            for where in idle[: len(self._sites) - MAX_SITES]:
                del self._sites[where]

    def _explain(self, site: Site) -> str:
        if site.error:
            return site.error
        if not site.addresses:
            return "None has registered there."
        if not site.trouble_ns:
            return "The request has not reached them in time."
        refusals = [self._refusals[address][0] for address in site.addresses if address in self._refusals]
        return " ".join(refusals) or "None of them answers: they are stopped, or the network is."


class Claims:
    """Prefill's side: rooms whose request is here, and who has asked for others. Bounded in number and time."""

    def __init__(self) -> None:
        self._mine: OrderedDict[int, tuple[str, int]] = OrderedDict()  # room -> ("", when it was claimed)
        self._sought: OrderedDict[int, tuple[str, int]] = OrderedDict()  # room -> (instance, when it asked)
        self._told: OrderedDict[int, tuple[str, int]] = OrderedDict()  # room -> (instance, when it was told)

    def claim(self, room: int, now_ns: int) -> str | None:
        """The request of `room` is here; the instance that has asked for it already."""
        _remember(self._mine, room, "", now_ns)
        asked = self._sought.pop(room, None)
        return asked[0] if asked else None

    def seek(self, room: int, instance: str, now_ns: int) -> bool:
        """Whether the request of `room` is here; otherwise `claim` will name the instance."""
        if room in self._mine:
            return True
        _remember(self._sought, room, instance, now_ns)
        return False

    def told(self, room: int, instance: str, now_ns: int) -> None:
        """The instance knows that the request is here, and will ask for its pages."""
        _remember(self._told, room, instance, now_ns)

    def met(self, room: int) -> None:
        """It has."""
        self._told.pop(room, None)

    def left_by(self, instance: str) -> list[int]:
        """The rooms that an instance was told of and did not ask for; they are forgotten."""
        left = [room for room, (told, _) in self._told.items() if told == instance]
        for room in left:
            del self._told[room]
        return left


def _remember(rooms: OrderedDict[int, tuple[str, int]], room: int, instance: str, now_ns: int) -> None:
    while rooms and (len(rooms) >= MAX_CLAIMS or next(iter(rooms.values()))[1] <= now_ns - CLAIM_NS):
        rooms.popitem(last=False)
    rooms[room] = (instance, now_ns)
