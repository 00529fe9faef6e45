"""The prefix tree: which token sequences have their KV in pages, shared by all requests under one extra key.

A node holds a run of tokens, a multiple of the page size long, and the pages of that run. Children are found by the
tokens of their first page. A request locks the node its prefix ends at; a lock counts on every ancestor, so the count
never grows away from the root, and unlocked nodes always hang below locked ones. Only unlocked leaves are evicted.

Order is kept by a counter of tree operations, not by a clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moonlang.base.errors import BugError
from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.eviction import EvictionOrder
from moonlang.mem_cache.journal import Journal
from moonlang.mem_cache.pool import Owner, PagePool


class Node:
    """A run of cached tokens. `used`: the tree's operation counter at the last match or insert; `hits`: how many.
    `weight`: pages in this node and all below it. `keys`: of its pages, where a journal is kept."""

    __slots__ = (
        "children",
        "extra_key",
        "hits",
        "id",
        "keys",
        "listed",
        "locks",
        "pages",
        "parent",
        "tokens",
        "used",
        "weight",
    )

    def __init__(self, node_id: int, parent: Node | None, tokens: list[int], pages: list[int], extra_key: str) -> None:
        self.id = node_id
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.extra_key = extra_key
        self.children: dict[tuple[int, ...], Node] = {}
        self.locks = 0
        self.hits = 0
        self.used = node_id
        self.weight = len(pages)
        self.keys: list[bytes] = []
        self.listed = False  # in the heap of eviction candidates


@dataclass(frozen=True, slots=True)
class Inserted:
    """Outcome of an insert. ref: the tree's node for all the tokens; pages: the tree's page for each page of them,
    which differs from the caller's where the tree already held those tokens."""

    ref: PrefixRef
    pages: list[int]


class RadixCache:
    """PrefixCache over a PagePool. `order` ranks the unlocked leaves for eviction (see `eviction`)."""

    def __init__(self, pool: PagePool, page_size: int, order: EvictionOrder) -> None:
        self._pool = pool
        self._page_size = page_size
        self._order = order
        self._roots: dict[str, Node] = {}
        self._counter = 0
        self._evictable = 0  # pages in nodes without a lock
        self._num_nodes = 0
        self._heap: list[tuple[tuple[int, ...], int, Node]] = []
        self.journal: Journal | None = None  # set before anything is inserted

    @property
    def evictable_pages(self) -> int:
        """Pages that `evict` could free now."""
        return self._evictable

    @property
    def num_nodes(self) -> int:
        """Nodes, the roots not counted."""
        return self._num_nodes

    @property
    def roots(self) -> list[Node]:
        """One per extra key; they hold no tokens."""
        return list(self._roots.values())

    @property
    def clock(self) -> int:
        """The counter of operations that `Node.used` is taken from."""
        return self._counter

    def match_length(self, tokens: Sequence[int], extra_key: str, limit: int) -> int:
        """How many of the first `limit` tokens are cached, in whole pages; changes nothing."""
        return sum(length for _, length in self._walk(tokens, extra_key, limit))

    def locate(self, tokens: Sequence[int], extra_key: str, limit: int) -> Node | None:
        """The deepest node with some of the first `limit` tokens; changes nothing."""
        along = [node for node, _ in self._walk(tokens, extra_key, limit)]
        return along[-1] if along else None

    def match(self, tokens: Sequence[int], extra_key: str, limit: int) -> PrefixRef:
        """The longest cached prefix of the first `limit` tokens. Valid until the next evict unless locked."""
        self._counter += 1
        node, total = self._root(extra_key), 0
        for child, length in self._walk(tokens, extra_key, limit):
            node = child if length == len(child.tokens) else self._split(child, length)
            total += length
            self._touch(node)
        return PrefixRef(node, total)

    def pages(self, ref: PrefixRef) -> list[int]:
        """The pages of a prefix, in order."""
        runs = [node.pages for node in _to_root(ref.node)]
        return [page for run in reversed(runs) for page in run]

    def lock(self, ref: PrefixRef) -> None:
        for node in _to_root(ref.node):
            if node.locks == 0:
                self._evictable -= len(node.pages)
            node.locks += 1

    def unlock(self, ref: PrefixRef) -> None:
        for node in _to_root(ref.node):
            if node.locks == 0:
                raise BugError(f"Node {node.id} is unlocked more often than locked.")
            node.locks -= 1
            if node.locks == 0:
                self._evictable += len(node.pages)
                self._list(node)

    def insert(self, tokens: Sequence[int], pages: Sequence[int], extra_key: str) -> Inserted:
        """Make the tree hold `tokens` (whole pages), whose KV is in `pages`.

        Where the tree lacks them it adopts the caller's leased pages; where it has them already it keeps its own.
        """
        size = self._page_size
        if len(tokens) != len(pages) * size:
            raise BugError(f"{len(tokens)} tokens do not fill {len(pages)} pages of {size}.")
        self._counter += 1
        node, kept = self._root(extra_key), []
        for child, length in self._walk(tokens, extra_key, len(tokens)):
            node = child if length == len(child.tokens) else self._split(child, length)
            kept += node.pages
            self._touch(node)
        if len(kept) < len(pages):
            fresh = list(pages[len(kept) :])
            self._pool.adopt(fresh)
            node = self._add(node, list(tokens[len(kept) * size :]), fresh)
            kept += fresh
        return Inserted(PrefixRef(node, len(tokens)), kept)

    def evict(self, count: int) -> int:
        """Free at least `count` pages from the leaves that rank lowest, or all that can be; returns how many."""
        freed = 0
        while freed < count and self._heap:
            rank, _, node = heapq.heappop(self._heap)
            node.listed = False
            if not self._is_candidate(node):
                continue
            if rank != self._order(node):  # used since it was listed
                self._list(node)
                continue
            self._remove(node)
            freed += len(node.pages)
        return freed

    def coldest(self, pages: int) -> list[tuple[list[int], str]]:
        """(tokens from the root, extra key) of the leaves that rank lowest, with `pages` pages; changes nothing."""
        found: list[tuple[list[int], str]] = []
        live = (node for node in self.nodes() if self._is_candidate(node))
        for node in sorted(live, key=lambda node: (self._order(node), node.id)):
            if pages <= 0:
                break
            runs = [above.tokens for above in _to_root(node)]
            found.append(([token for run in reversed(runs) for token in run], node.extra_key))
            pages -= len(node.pages)
        return found

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """BugError unless the structure holds: O(nodes)."""
        evictable = count = 0
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            if parent.children.get(self._key(node.tokens, 0)) is not node:
                raise BugError(f"Node {node.id} is not under its key.")
            if not node.tokens or len(node.tokens) != len(node.pages) * self._page_size:
                raise BugError(f"Node {node.id}: {len(node.tokens)} tokens in {len(node.pages)} pages.")
            if node.locks > parent.locks:
                raise BugError(f"Node {node.id} has {node.locks} locks, its parent {parent.locks}.")
            if any(self._pool.owner(page) != Owner.CACHED for page in node.pages):
                raise BugError(f"Node {node.id} holds a page that the tree does not own.")
            if node.weight != len(node.pages) + sum(child.weight for child in node.children.values()):
                raise BugError(f"Node {node.id} weighs {node.weight} pages, which is not what is below it.")
            evictable += len(node.pages) if node.locks == 0 else 0
            count += 1
        if evictable != self._evictable:
            raise BugError(f"{evictable} pages are evictable, {self._evictable} were counted.")
        if count != self._num_nodes:
            raise BugError(f"The tree has {count} nodes, {self._num_nodes} were counted.")

    # ---- inside

    def _root(self, extra_key: str) -> Node:
        root = self._roots.get(extra_key)
        if root is None:
            self._counter += 1
            root = self._roots[extra_key] = Node(self._counter, None, [], [], extra_key)
        return root

    def _key(self, tokens: Sequence[int], at: int) -> tuple[int, ...]:
        return tuple(tokens[at : at + self._page_size])

    def _walk(self, tokens: Sequence[int], extra_key: str, limit: int) -> Iterator[tuple[Node, int]]:
        """The nodes along `tokens` and the length matched in each, in whole pages; only the last may match in part."""
        node, at = self._roots.get(extra_key), 0
        size = self._page_size
        end = min(limit, len(tokens)) // size * size
        while node is not None and at < end:
            node = node.children.get(self._key(tokens, at))
            if node is None:
                return
            full = len(node.tokens)
            length = _common_prefix(node.tokens, tokens, at, min(full, end - at)) // size * size
            yield node, length
            if length < full:
                return
            at += length

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens: a new node takes the head, `node` keeps the tail, its id and its locks."""
        parent = node.parent
        assert parent is not None
        self._counter += 1
        count = length // self._page_size
        head = Node(self._counter, parent, node.tokens[:length], node.pages[:count], node.extra_key)
        head.locks, head.hits, head.used, head.weight = node.locks, node.hits, node.used, node.weight
        head.keys, node.keys = node.keys[:count], node.keys[count:]
        node.weight -= count
        self._num_nodes += 1
        parent.children[self._key(head.tokens, 0)] = head
        node.parent, node.tokens, node.pages = head, node.tokens[length:], node.pages[count:]
        head.children[self._key(node.tokens, 0)] = node
        return head

    def _add(self, parent: Node, tokens: list[int], pages: list[int]) -> Node:
        self._counter += 1
        node = Node(self._counter, parent, tokens, pages, parent.extra_key)
        parent.children[self._key(tokens, 0)] = node
        if self.journal is not None:
            node.keys = self.journal.stored(parent.keys[-1] if parent.keys else None, tokens, node.extra_key)
        self._evictable += len(pages)
        self._num_nodes += 1
        _weigh(parent, len(pages))
        self._touch(node)
        self._list(node)
        return node

    def _touch(self, node: Node) -> None:
        node.used = self._counter
        node.hits += 1

    def _is_candidate(self, node: Node) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None

    def _list(self, node: Node) -> None:
        """Keep unlocked leaves in the heap. Ranks only grow, so an old entry is put right when it is popped."""
        if self._is_candidate(node):
            if not node.listed:
                node.listed = True
                heapq.heappush(self._heap, (self._order(node), node.id, node))
        elif node.locks == 0 and not node.children and self._roots.get(node.extra_key) is node:
            del self._roots[node.extra_key]

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[self._key(node.tokens, 0)]
        node.parent = None
        if self.journal is not None:
            self.journal.removed(node.keys)
        self._evictable -= len(node.pages)
        self._num_nodes -= 1
        _weigh(parent, -len(node.pages))
        self._pool.release(node.pages, Owner.CACHED)
        self._list(parent)


def _to_root(node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = node.parent


def _weigh(node: Node | None, pages: int) -> None:
    """So many pages have come below `node`."""
    while node is not None:
        node.weight += pages
        node = node.parent


def _common_prefix(run: list[int], tokens: Sequence[int], at: int, most: int) -> int:
    """Length of the common prefix of `run` and tokens[at:], at most `most`: halving by slice comparisons (in C)."""
    low, high = 0, most
    step = most
    while low < high:
        if run[low : low + step] == list(tokens[at + low : at + low + step]):
            low += step
        else:
            high = low + step - 1
        step = max(1, (high - low + 1) // 2)
    return low
