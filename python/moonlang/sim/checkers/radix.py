"""The shape of the prefix tree, and its locks recounted from those who hold them."""

from __future__ import annotations

from moonlang.mem_cache.radix import Node
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch, is_due
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "radix"


class Radix(Watch[Stage]):
    """Whole pages, keyed by the first page, no empty node, one lock per running request on every node of its prefix."""

    def after_step(self, stage: Stage) -> None:
        if is_due(stage):
            check_tree(stage)

    def at_end(self, stage: Stage) -> None:
        check_tree(stage)
        locked = [node.id for node in inside.cache(stage.scheduler).nodes() if node.locks]
        if locked:
            raise Violation(_NAME, f"nodes {locked} are locked although nothing runs")


def check_tree(stage: Stage) -> None:
    """Violation unless the tree of this world's scheduler is sound."""
    size = stage.config.page_size
    holders = _holders(stage)
    for node in inside.cache(stage.scheduler).nodes():
        if not node.tokens or len(node.tokens) % size or len(node.tokens) != size * len(node.pages):
            raise Violation(_NAME, f"node {node.id} has {len(node.tokens)} tokens in {len(node.pages)} pages of {size}")
        parent = node.parent
        assert parent is not None
        if parent.children.get(tuple(node.tokens[:size])) is not node:
            raise Violation(_NAME, f"node {node.id} is not filed under its first page")
        if parent.extra_key != node.extra_key:
            raise Violation(_NAME, f"node {node.id} of key {node.extra_key!r} hangs below key {parent.extra_key!r}")
        if node.locks > parent.locks:
            raise Violation(_NAME, f"node {node.id} has {node.locks} locks and its parent {parent.locks}")
        if node.locks != holders.get(node.id, 0):
            raise Violation(_NAME, f"node {node.id} has {node.locks} locks and {holders.get(node.id, 0)} holders")


def _holders(stage: Stage) -> dict[int, int]:
    """Node id -> locked prefixes that go through it."""
    holders: dict[int, int] = {}
    for prefix in inside.locks(stage.scheduler):
        node: Node | None = prefix.node
        while node is not None:
            holders[node.id] = holders.get(node.id, 0) + 1
            node = node.parent
    return holders
