"""Bugs of our own making, planted in the PD halves: what a hurried hand would get wrong (see `sim.mutants`)."""

from __future__ import annotations

from moonlang.sim.mutants import Mutant

_DECODE = "scheduler.decode_side"
_PREFILL = "scheduler.prefill_side"
_PARTINGS = "scheduler.partings"
_PUSHES = "scheduler.pushes"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="silent is gone",
        what="a peer that does not answer is taken for dead, and its pages are given away while it may still write",
        module=_PARTINGS,
        old="parting.drained |= gone",
        new="parting.drained = True",
        kind="pd",
    ),
    Mutant(
        name="drained too early",
        what="prefill says that nothing is under way while pushes are",
        module=_PREFILL,
        old="        if room.pushes or room.final is None:\n            return\n",
        new="        if room.final is None:\n            return\n",
        kind="pd",
    ),
    Mutant(
        name="layers too early",
        what="all layers are pushed as soon as the first ones are written",
        module=_PUSHES,
        old="self._push(part.room, part.first, part.end, part.layers, layers)\n                part.layers = layers",
        new="self._push(part.room, part.first, part.end, part.layers, self._layers)\n"
        "                part.layers = self._layers",
        kind="pd",
    ),
    Mutant(
        name="last page forgotten",
        what="the page that a prompt fills in part only is not pushed",
        module=_PUSHES,
        old="whole = -(-end // size) if end == room.request.prompt_len else end // size",
        new="whole = end // size",
        kind="pd",
    ),
    Mutant(
        name="cached pages forgotten",
        what="pages that prefill finds in its own cache are not pushed",
        module=_PUSHES,
        old="            self._push(room, room.next_page, cached, 0, self._layers)\n",
        new="",
        kind="pd",
    ),
    Mutant(
        name="lent and exchanged",
        what="pages that a push reads are exchanged for the tree's and freed",
        module=_PUSHES,
        old="        lease.lent = True\n",
        new="",
        kind="pd",
    ),
    Mutant(
        name="no last word",
        what="prefill says only once how a room has ended, even when it is asked again",
        module=_PREFILL,
        old="room.repeat_ns = self._now_ns + self._config.repeat_ns",
        new="room.repeat_ns = 1 << 62",
        more=(("        else:\n            self._remind(room, due=True)\n        return []\n", "        return []\n"),),
        kind="pd",
    ),
    Mutant(
        name="released once",
        what="decode says only once that it is done with a room",
        module=_PARTINGS,
        old="parting.repeat_ns = now_ns + self._repeat_ns",
        new="parting.repeat_ns = 1 << 62",
        kind="pd",
    ),
    Mutant(
        name="seen is verified",
        what="decode goes on while its look at the last pages is still under way",
        module=_DECODE,
        old="or want is None or room.unverified or",
        new="or want is None or",
        kind="pd",
    ),
    Mutant(
        name="one token twice",
        what="the first token is delivered again by the slot that goes on with it",
        module="scheduler.planner",
        old="            at = request.prompt_len\n",
        new="            at = request.prompt_len - 1\n",
        kind="pd",
    ),
)
