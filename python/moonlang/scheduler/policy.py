"""In which order waiting requests are tried. A policy gives each request a sort key; arrival order breaks ties.

lpm: longest cached prefix first.  dfs-weight: along the tree, heaviest branch first, so that requests which share a
prefix run together.  lof: longest output first.  With priorities switched on they come before the policy's own key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moonlang.core.request import Request
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.radix import Node, RadixCache
from moonlang.scheduler.settings import SchedulerConfig

Cache = RadixCache | NoCache
Key = tuple[int, ...]
Policy = Callable[[Sequence[Request], Cache], list[Key]]

_CACHE_AWARE_QUEUE = 128  # beyond this queue length matching every request costs more than it brings


def order(waiting: list[Request], cache: Cache, config: SchedulerConfig) -> list[Request]:
    """`waiting` in the order of admission."""
    if len(waiting) < 2:
        return list(waiting)
    name = config.policy
    if name in _CACHE_AWARE and (len(waiting) > _CACHE_AWARE_QUEUE or not config.radix):
        name = "fcfs"
    if name == "random":
        keys: list[Key] = [(_mix(request.order, config.seed),) for request in waiting]
    else:
        keys = POLICIES[name](waiting, cache)
    sign = 0 if not config.priority else 1 if config.priority_low_first else -1
    ranked = sorted(zip(keys, waiting, strict=True), key=lambda kr: (sign * kr[1].priority, kr[0], kr[1].order))
    return [request for _, request in ranked]


def reusable(request: Request) -> int:
    """How many leading tokens may come from the cache: not the last one, whose logits are wanted, and none of the
    positions whose log probabilities are asked for."""
    limit = len(request.tokens) - 1
    if request.logprob is not None and request.logprob.start >= 0:
        limit = min(limit, max(0, request.logprob.start - 1))
    return limit


def _fcfs(waiting: Sequence[Request], cache: Cache) -> list[Key]:
    return [()] * len(waiting)


def _lof(waiting: Sequence[Request], cache: Cache) -> list[Key]:
    return [(-request.remaining,) for request in waiting]


def _lpm(waiting: Sequence[Request], cache: Cache) -> list[Key]:
    return [(-cache.match_length(r.tokens, r.extra_key, reusable(r)),) for r in waiting]


def _dfs_weight(waiting: Sequence[Request], cache: Cache) -> list[Key]:
    """Key: place of the request's node in a walk that finishes the subtree with most requests first."""
    ends = [cache.locate(r.tokens, r.extra_key, reusable(r)) for r in waiting]
    weight: dict[int, int] = {}
    children: dict[int, dict[int, Node]] = {}
    roots: dict[int, Node] = {}
    for end in ends:
        if end is None:
            continue
        node = end
        weight[node.id] = weight.get(node.id, 0) + 1
        while node.parent is not None:
            weight[node.parent.id] = weight.get(node.parent.id, 0) + 1
            children.setdefault(node.parent.id, {})[node.id] = node
            node = node.parent
        roots[node.id] = node
    # Children before their parent, heavy before light: the reverse of a walk from the top that takes light ones first.
    walk: list[int] = []
    stack = sorted(roots.values(), key=lambda n: (-weight[n.id], n.id))
    while stack:
        node = stack.pop()
        walk.append(node.id)
        stack.extend(sorted(children.get(node.id, {}).values(), key=lambda n: (-weight[n.id], n.id)))
    place = {node_id: -at for at, node_id in enumerate(walk)}
    return [(1 if end is None else place[end.id],) for end in ends]


def _mix(value: int, seed: int) -> int:
    """A fixed shuffle of 64-bit integers (the finaliser of splitmix64): the brain draws no random numbers."""
    mask = (1 << 64) - 1
    value = (value * 0x9E3779B97F4A7C15 + seed) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


_CACHE_AWARE = ("lpm", "dfs-weight")
POLICIES: dict[str, Policy] = {"fcfs": _fcfs, "priority": _fcfs, "lof": _lof, "lpm": _lpm, "dfs-weight": _dfs_weight}
