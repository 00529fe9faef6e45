"""Bugs planted on purpose, to see whether the simulator finds them.

A mutant is a replacement in the text of one module of the brain. `hunt` loads a second copy of the brain with that text
and runs seeds until a checker speaks up. Some of them are bugs that the simulator has found in earnest, planted again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from moonlang.base.errors import BugError
from moonlang.scheduler.scheduler import Scheduler
from moonlang.sim import checkers
from moonlang.sim.run import Kind, draw_case, run
from moonlang.sim.stage import Checker
from moonlang.sim.world import World

_BRAIN = ("moonlang.mem_cache", "moonlang.scheduler", "moonlang.core.layout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old` must occur exactly once in `module` and is replaced by `new`; more: further replacements of this kind.
    equivalent: no answer can become wrong. kind: of the worlds in which it is hunted."""

    name: str
    what: str
    module: str
    old: str
    new: str
    more: tuple[tuple[str, str], ...] = ()
    equivalent: bool = False
    kind: Kind = "plain"

    @property
    def edits(self) -> tuple[tuple[str, str], ...]:
        return ((self.old, self.new), *self.more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a hunt ended: after how many seeds, and with which violation, if any."""

    seeds: int
    violation: tuple[str, str] | None

    @property
    def caught(self) -> bool:
        return self.violation is not None

    def describe(self) -> str:
        if self.violation is None:
            return f"survives {self.seeds} seeds"
        return f"caught by {self.violation[0]} after {self.seeds} seed{'s' if self.seeds > 1 else ''}"


def hunt(mutant: Mutant, seeds: range, watch: Callable[[], Sequence[Checker[World]]] = checkers.fresh) -> Verdict:
    """Run these cases against the mutant, until one fails."""
    make_scheduler = load(mutant)
    for count, seed in enumerate(seeds, 1):
        outcome = run(draw_case(seed, mutant.kind), make_scheduler=make_scheduler, watch=watch)
        if outcome.failure is not None:
            return Verdict(seeds=count, violation=outcome.failure)
    return Verdict(seeds=len(seeds), violation=None)


def is_stale(mutant: Mutant) -> bool:
    """True when the brain has changed so that the mutant's text is not there, or not unique, any more."""
    spec = importlib.util.find_spec(f"moonlang.{mutant.module}")
    if spec is None or spec.origin is None:
        return True
    text = Path(spec.origin).read_text(encoding="utf-8")
    return any(text.count(old) != 1 for old, _ in mutant.edits)


def load(mutant: Mutant) -> type[Scheduler]:
    """The Scheduler class of a fresh copy of the brain that has this mutant in it."""
    if is_stale(mutant):
        raise BugError(f"Mutant {mutant.name!r} does not fit {mutant.module} any more.", hint="Bring it up to date.")
    finder = _Planter(mutant)
    with _brain_set_aside():
        sys.meta_path.insert(0, finder)
        try:
            return importlib.import_module("moonlang.scheduler.scheduler").Scheduler
        finally:
            sys.meta_path.remove(finder)


@contextmanager
def _brain_set_aside() -> Iterator[None]:
    """Inside, the brain's modules are not loaded; afterwards they are the ones from before."""
    originals = {name: module for name, module in sys.modules.items() if name.startswith(_BRAIN)}
    for name in originals:
        del sys.modules[name]
    for name in _BRAIN:
        package, _, short = name.rpartition(".")
        delattr(sys.modules[package], short)
    try:
        yield
    finally:
        sys.modules.update(originals)
        for name in _BRAIN:
            package, _, short = name.rpartition(".")
            setattr(sys.modules[package], short, originals[name])


class _Planter(MetaPathFinder):
    """Finds one module, the mutant's."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != f"moonlang.{self._mutant.module}":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _MutantLoader(fullname, spec.origin, self._mutant)
        return spec


class _MutantLoader(SourceFileLoader):
    """Compiles the changed text, past the cache of byte code."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        text = Path(self.path).read_text(encoding="utf-8")
        for old, new in self._mutant.edits:
            text = text.replace(old, new)
        return compile(text, f"{self.path}*", "exec")


_SCHEDULER = "scheduler.scheduler"
_ROSTER = "scheduler.roster"
_PLANNER = "scheduler.planner"
_RADIX = "mem_cache.radix"
_LEASES = "mem_cache.leases"
_POOL = "mem_cache.pool"

MUTANTS: tuple[Mutant, ...] = (
    # ---- pages
    Mutant(
        name="page leak",
        what="a closed lease forgets one of its pages",
        module=_LEASES,
        old="self._give_back(lease.pages[lease.shared :], plan)",
        new="self._give_back(lease.pages[lease.shared + 1 :], plan)",
    ),
    Mutant(
        name="twice computed",
        what="pages that another request was faster to share are not given back",
        module=_LEASES,
        old="        self._give_back([lease.pages[i] for i in changed], plan)\n",
        new="",
    ),
    Mutant(
        name="stale table",
        what="the executor is not told that a page was replaced by the tree's",
        module=_ROSTER,
        old="request.sent_pages = min(request.sent_pages, changed)",
        new="pass",
    ),
    Mutant(
        name="free in flight",
        what="pages are freed while a plan in flight writes to them",
        module=_ROSTER,
        old="return request.last_plan if in_flight else None",
        new="return None",
    ),
    Mutant(
        name="pinned too short",
        what="pages wait for the oldest plan in flight, not for the newest that writes to them",
        module=_ROSTER,
        old="return request.last_plan if in_flight else None",
        new="return self.in_flight[0].plan_id if in_flight else None",
    ),
    Mutant(
        name="unpinned early",
        what="pinned pages are freed one plan too early",
        module=_POOL,
        old="self._pinned[0][0] <= plan_id:",
        new="self._pinned[0][0] <= plan_id + 1:",
    ),
    Mutant(
        name="page zero",
        what="the padding page is handed out",
        module=_POOL,
        old="range(num_pages - 1, 0, -1)",
        new="range(num_pages - 1, -1, -1)",
    ),
    Mutant(
        name="alone on credit",
        what="a lone request starts although pages of ended requests are still pinned (found by seed 120)",
        module=_PLANNER,
        old="        return self._memory.grow(lease, end)\n",
        new="        self._memory.grow(lease, end)\n        return True\n",
    ),
    # ---- tree
    Mutant(
        name="locked eviction",
        what="a leaf is evicted although a request has locked it",
        module=_RADIX,
        old="return node.locks == 0 and not node.children and node.parent is not None",
        new="return not node.children and node.parent is not None",
    ),
    Mutant(
        name="page too much",
        what="a page is cached whose last token has no KV yet",
        module=_LEASES,
        old="count = computed // self.page_size",
        new="count = min(computed + 1, len(tokens)) // self.page_size",
    ),
    Mutant(
        name="match too long",
        what="a prefix match counts one token more than is equal",
        module=_RADIX,
        old="length = _common_prefix(node.tokens, tokens, at, min(full, end - at)) // size * size",
        new="length = min(full, _common_prefix(node.tokens, tokens, at, min(full, end - at)) + 1) // size * size",
    ),
    Mutant(
        name="whole prompt cached",
        what="all tokens may come from the cache, so that no logits are computed",
        module="scheduler.policy",
        old="limit = len(request.tokens) - 1",
        new="limit = len(request.tokens)",
    ),
    Mutant(
        name="one salt",
        what="requests of different extra keys share pages",
        module=_LEASES,
        old="done = self.cache.insert(tokens[: count * self.page_size], lease.pages[:count], extra_key)",
        new='done = self.cache.insert(tokens[: count * self.page_size], lease.pages[:count], "")',
    ),
    Mutant(
        name="lock leak",
        what="a lease that moves down the tree keeps the lock on its old prefix",
        module=_LEASES,
        old="        self.cache.unlock(lease.prefix)\n        lease.prefix, lease.shared",
        new="        lease.prefix, lease.shared",
    ),
    Mutant(
        name="unlocked head",
        what="the upper half of a split node loses its locks",
        module=_RADIX,
        old="head.weight = node.locks, node.hits, node.used, node.weight",
        new="head.weight = 0, node.hits, node.used, node.weight",
    ),
    Mutant(
        name="newest first",
        what="eviction takes the most recently used leaf",
        module="mem_cache.eviction",
        old="return (node.used,)",
        new="return (-node.used,)",
        equivalent=True,
    ),
    # ---- slots, epochs, rows
    Mutant(
        name="slot leak",
        what="a request that leaves without output keeps its slot",
        module=_ROSTER,
        old="        self.slots.append(request.slot)\n",
        new="        if request.output_len:\n            self.slots.append(request.slot)\n",
    ),
    Mutant(
        name="same epoch",
        what="a slot's next tenant has the epoch of the one before",
        module=_ROSTER,
        old="self._next_epoch += 1",
        new="self._next_epoch += 0",
    ),
    Mutant(
        name="late row",
        what="the result of a row is given to whoever has the slot now",
        module=_SCHEDULER,
        old="if request is not None and request.epoch == row.epoch:",
        new="if request is not None:",
    ),
    Mutant(
        name="sample counted twice",
        what="a sample in flight counts as two",
        module=_PLANNER,
        old="request.pending += sample",
        new="request.pending += 2 * sample",
    ),
    Mutant(
        name="over budget",
        what="a prompt is laid into the plan beyond the chunk size",
        module=_PLANNER,
        old="end, size = start + budget, self._config.page_size",
        new="end, size = start + budget + 1, self._config.page_size",
    ),
    # ---- retraction
    Mutant(
        name="output lost",
        what="a retracted request forgets its output",
        module=_ROSTER,
        old="        request.retractions += 1\n",
        new="        request.retractions += 1\n        del request.tokens[request.prompt_len :]\n",
    ),
    Mutant(
        name="lost at retraction",
        what="a retracted request is not queued again",
        module=_ROSTER,
        old="        self._queue_again(request)\n        self.ratio.tighten(self.running.values())",
        new="        self.ratio.tighten(self.running.values())",
    ),
    Mutant(
        name="logprobs twice",
        what="a retracted request gets its prompt logprobs again (found by seed 65)",
        module=_SCHEDULER,
        old="start = request.logprob.start + len(outcome.prompt)",
        new="start = request.logprob.start",
    ),
    # ---- what clients see
    Mutant(
        name="logprobs from the cache",
        what="positions whose log probabilities are wanted may come from the cache, which has none",
        module="scheduler.policy",
        old="limit = min(limit, max(0, request.logprob.start - 1))",
        new="limit = min(limit, len(request.tokens) - 1)",
    ),
    Mutant(
        name="double delivery",
        what="every delta repeats the tokens before it",
        module="scheduler.outbox",
        old="if outcome is not None and self.merged:",
        new="if outcome is not None and (setattr(self, 'merged', False), True)[1]:",
    ),
    Mutant(
        name="second head",
        what="the head of a stream comes with every delta",
        module="scheduler.outbox",
        old="head = None if self.told else self._head(request)",
        new="head = self._head(request)",
    ),
    Mutant(
        name="one token more",
        what="max_new_tokens is exceeded by one",
        module="scheduler.intake",
        old="len(message.input_ids) + wanted",
        new="len(message.input_ids) + wanted + 1",
    ),
    Mutant(
        name="eos not ignored",
        what="ignore_eos is ignored",
        module=_SCHEDULER,
        old="(eos and not sampling.ignore_eos)",
        new="eos",
    ),
    # ---- queue and clock
    Mutant(
        name="lost wake-up",
        what="requests whose grammar is ready are not queued",
        module=_SCHEDULER,
        old="                deltas += self._enqueue(request, now_ns)\n",
        new="                request.state = State.WAITING\n",
    ),
    Mutant(
        name="late deadline",
        what="a deadline ends only requests that still wait",
        module=_SCHEDULER,
        old="if r.deadline_ns is not None and r.deadline_ns <= now_ns]",
        new="if r.deadline_ns is not None and r.deadline_ns <= now_ns and r.slot < 0]",
    ),
    Mutant(
        name="low priority first",
        what="the order of priorities is upside down",
        module="scheduler.policy",
        old="1 if config.priority_low_first else -1",
        new="-1 if config.priority_low_first else 1",
    ),
    Mutant(
        name="equals preempt",
        what="with a gap of 0 requests of equal priority push each other out (found by seed 88)",
        module=_PLANNER,
        old="< max(1, config.preempt_gap):",
        new="< config.preempt_gap:",
    ),
    Mutant(
        name="waits for a ghost",
        what="a prefix goes on counting as being computed after the request that computed it has left",
        module=_ROSTER,
        old="        if self.prefilling:\n",
        new="        if False:\n",
    ),
    Mutant(
        name="queue bound",
        what="requests that wait for a grammar do not count as waiting",
        module=_SCHEDULER,
        old="waiting = len(self._roster.waiting) + len(self._gate) +",
        new="waiting = len(self._roster.waiting) +",
    ),
)
