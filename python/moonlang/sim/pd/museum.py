"""Faults that users of other engines have reported, planted in the PD halves of this one; the name is the issue's.

Each must be caught within `MOST_SEEDS` cases; `first` is the case that catches it today, so that a test need not run
all of those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moonlang.sim.mutants import Mutant

MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A fault, and the first case that catches it."""

    mutant: Mutant
    first: int


def _exhibit(first: int, issue: str, what: str, module: str, *edits: tuple[str, str]) -> Exhibit:
    (old, new), *more = edits
    return Exhibit(Mutant(name=issue, what=what, module=module, old=old, new=new, more=tuple(more), kind="pd"), first)


_DECODE = "scheduler.decode_side"
_PREFILL = "scheduler.prefill_side"
_PARTINGS = "scheduler.partings"
_PUSHES = "scheduler.pushes"
_LAYOUT = "core.layout"
_QUARANTINE = "self._roster.memory.quarantine(request.lease)"

EXHIBITS: tuple[Exhibit, ...] = (
    # ---- hangs
    _exhibit(
        0,
        "sglang#6215",
        "decode hangs on a prefill instance that is dead",
        _DECODE,
        ('            deltas += self._fail(room, "The prefill instance is out of reach.")\n', "            pass\n"),
    ),
    _exhibit(
        4,
        "sglang#34289",
        "prefill is replaced behind the same address: what decode had lent to its predecessor never comes back",
        _PARTINGS,
        ("            parting.drained |= gone\n", ""),
    ),
    _exhibit(
        8,
        "sglang#9726",
        "decode goes on waiting after prefill has failed",
        _PREFILL,
        ("            self._conclude(room, refuse)\n", "            room.final, room.repeat_ns = refuse, 1 << 62\n"),
        ("        else:\n            self._remind(room, due=True)\n        return []\n", "        return []\n"),
    ),
    _exhibit(
        25,
        "sglang#29978",
        "a lost control message is a hang",
        _DECODE,
        ("room.repeat_ns = self._now_ns + self._config.repeat_ns", "room.repeat_ns = 1 << 62"),
    ),
    _exhibit(
        134,
        "sglang#16903",
        "the death of one peer fails the requests of the others",
        _DECODE,
        ("if r.card is not None and r.card.instance == instance]", "if r.card is not None]"),
    ),
    _exhibit(
        1,
        "sglang#32758",
        "one huge transfer instead of bounded ones",
        _PUSHES,
        ("most = max(1, self._config.push_most_bytes //", "most = max(1, (1 << 40) //"),
    ),
    # ---- leaks
    _exhibit(
        7,
        "llm-d#1138",
        "a cancel while pages are on their way strands them on prefill until a timeout",
        _PREFILL,
        (
            "        if room.final is not None:\n            self._settle(room)\n            return []\n",
            "        if room.final is not None:\n            return []\n",
        ),
        (
            "                self._settle(room)\n                return []\n",
            "                if isinstance(room.final, Landed):\n"
            "                    self._settle(room)\n                return []\n",
        ),
    ),
    _exhibit(
        0,
        "sglang#9817",
        "an abort after the pages were allocated leaks them",
        _DECODE,
        (f"pages = {_QUARANTINE}\n", f"{_QUARANTINE}\n"),
    ),
    _exhibit(
        1,
        "sglang#8352",
        "prefill keeps the pages of requests that went well, until none are left",
        _PREFILL,
        (
            "            memory.close(room.lease, touching)\n",
            "            if isinstance(room.final, Refuse):\n                memory.close(room.lease, touching)\n",
        ),
    ),
    _exhibit(
        7,
        "sglang#36926",
        "a prefill that is aborted between two chunks leaks what it has computed",
        _PREFILL,
        ("        room.lease = lease or room.lease\n", ""),
    ),
    _exhibit(
        7,
        "sglang#18701",
        "a request that is aborted while it waits for a slot leaks its pages",
        "scheduler.scheduler",
        ("                roster.unlease(request)\n", "                pass\n"),
    ),
    _exhibit(
        6,
        "vllm#56430",
        "pages leak when a request falls back to computing by itself",
        _DECODE,
        (
            "        self._part(room, error)\n        request.peer, request.state = None, State.WAITING\n",
            "        self._part(room, error)\n        if room.number in self._partings:\n"
            "            self._partings._rooms[room.number].pages.clear()\n"
            "        request.peer, request.state = None, State.WAITING\n",
        ),
    ),
    # ---- wrong output
    _exhibit(
        1,
        "sglang#30233",
        "decode starts on KV of which a part is missing",
        _DECODE,
        ("or room.unverified or len(room.pushes) < landed.pushes:", "or room.unverified:"),
        ('            return "The prefill instance has not sent every page."\n', "            pass\n"),
    ),
    _exhibit(
        6,
        "sglang#23020",
        "KV that was damaged on its way is used",
        _DECODE,
        ("        if completion.value != pushed.checksum:\n", "        if False:\n"),
    ),
    _exhibit(
        0,
        "vllm#44238",
        "pages are used again while a transfer that was given up may still write to them",
        _DECODE,
        (f"pages = {_QUARANTINE}\n", "self._roster.memory.close(request.lease, None)\n"),
    ),
    _exhibit(
        1,
        "sglang#15674",
        "with fewer ranks on decode every rank's heads are read from the beginning of the page",
        _LAYOUT,
        ("source_head=head - origin.first_head,", "source_head=0,"),
    ),
    _exhibit(
        75,
        "sglang#23744",
        "with more ranks on prefill every rank's heads are written to the beginning of the page",
        _LAYOUT,
        ("target_head=head - region.first_head,", "target_head=0,"),
    ),
)
