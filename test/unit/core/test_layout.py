"""The layout planner, bit for bit: pages whose heads and layers are spread over ranks in one way are moved to ranks
that spread them in another way, and must hold what the model has put there."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from moonlang.config.stage import Stage
from moonlang.core import layout
from moonlang.core.kv import KvRegion, KvSchema, unsharded
from moonlang.core.pairing import Pushed, Span

SCHEMA = KvSchema(num_layers=3, num_kv_heads=8, head_dim=4, page_size=2, dtype="bfloat16", itemsize=2, fingerprint="a")
PAGES = 5


@dataclass
class Instance:
    """Pools of one instance, one per rank: [P, L, 2 (latents: 1), K, p, D] of two bytes each."""

    regions: tuple[KvRegion, ...]
    pools: list[NDArray[np.uint16]]

    def bytes(self, rank: int) -> NDArray[np.uint8]:
        """[P, page_bytes] of one rank."""
        return self.pools[rank].view(np.uint8).reshape(PAGES, -1)


def instance(
    ranks: int, heads: int = 8, content: NDArray[np.uint16] | None = None, latent: bool = False, stages: int = 1
) -> Instance:
    """`ranks` ranks in each stage; more than `heads` of them hold copies. content: [P, L, 2, heads, p, D] of the whole
    model."""
    own = max(1, heads // ranks)
    copies = max(1, ranks // heads)
    regions, pools = [], []
    for stage in range(stages):
        layers = Stage(stage, stages).layers(SCHEMA.num_layers)
        schema = msgspec.structs.replace(SCHEMA, num_layers=len(layers), num_kv_heads=own, latent=latent)
        for rank in range(ranks):
            first = rank // copies * own
            region = KvRegion(address=0, stride=schema.page_bytes, num_pages=PAGES, schema=schema, first_head=first)
            regions.append(msgspec.structs.replace(region, first_layer=layers.start))
            shape = (PAGES, len(layers), schema.halves, own, schema.page_size, schema.head_dim)
            part = np.zeros(shape, np.uint16)
            if content is not None:
                part[:] = content[:, layers.start : layers.stop, :, first : first + own]
            pools.append(part)
    return Instance(tuple(regions), pools)


def random_content(heads: int = 8) -> NDArray[np.uint16]:
    shape = (PAGES, SCHEMA.num_layers, 2, heads, SCHEMA.page_size, SCHEMA.head_dim)
    return np.random.default_rng(0).integers(1, 1 << 16, shape, np.uint16)


def push(source: Instance, target: Instance, page_map: dict[int, int], groups: list[tuple[int, int]]) -> int:
    """Copy pages layer group by layer group; every byte is written once. Returns the number of spans."""
    written = [np.zeros((PAGES, region.schema.page_bytes), int) for region in target.regions]
    spans = 0
    for route in layout.routes(source.regions, target.regions):
        for first, end in groups:
            sizes = 0
            for span in route.spans(first, end):
                spans += 1
                sizes += span.size
                for mine, theirs in page_map.items():
                    piece = source.bytes(route.source)[mine, span.source : span.source + span.size]
                    target.bytes(route.target)[theirs, span.target : span.target + span.size] = piece
                    written[route.target][theirs, span.target : span.target + span.size] += 1
            assert sizes == route.page_bytes(first, end)
    for counts in written:
        assert all((counts[page] == (page in page_map.values())).all() for page in range(PAGES))
    return spans


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (1, 8), (8, 1), (8, 4)])
@pytest.mark.parametrize("groups", [[(0, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]])
def test_every_head_arrives_where_it_belongs(ranks: tuple[int, int], groups: list[tuple[int, int]]) -> None:
    content = random_content()
    source, target = instance(ranks[0], content=content), instance(ranks[1])
    page_map = {0: 3, 2: 1, 4: 4}
    push(source, target, page_map, groups)
    right = np.zeros_like(content)
    for mine, theirs in page_map.items():
        right[theirs] = content[mine]
    for rank, expected in enumerate(instance(ranks[1], content=right).pools):
        assert np.array_equal(target.pools[rank], expected)


STAGES = [((1, 2), (1, 1)), ((1, 1), (1, 2)), ((1, 3), (1, 2)), ((2, 2), (2, 1)), ((2, 2), (4, 3)), ((4, 2), (1, 2))]


@pytest.mark.parametrize(("source_ranks", "target_ranks"), STAGES)
@pytest.mark.parametrize("groups", [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)]])
def test_every_layer_arrives_where_it_belongs(
    source_ranks: tuple[int, int], target_ranks: tuple[int, int], groups: list[tuple[int, int]]
) -> None:
    """(ranks of a stage, stages): three layers in two stages are one and two."""
    content = random_content()
    source = instance(source_ranks[0], content=content, stages=source_ranks[1])
    target = instance(target_ranks[0], stages=target_ranks[1])
    assert layout.mismatch(source.regions, target.regions) == ""
    assert unsharded(source.regions) == SCHEMA
    push(source, target, {page: page for page in range(PAGES)}, groups)
    right = instance(target_ranks[0], content=content, stages=target_ranks[1])
    for found, expected in zip(target.pools, right.pools, strict=True):
        assert np.array_equal(found, expected)


def test_stages_of_equal_heads_need_one_span_each() -> None:
    assert push(instance(2, content=random_content(), stages=2), instance(2), {0: 0}, [(0, 3)]) == 4


@pytest.mark.parametrize("ranks", [(8, 1), (1, 8), (8, 8), (2, 8), (8, 2)])
def test_ranks_that_hold_copies_of_a_head(ranks: tuple[int, int]) -> None:
    content = random_content(heads=2)
    source, target = instance(ranks[0], heads=2, content=content), instance(ranks[1], heads=2)
    push(source, target, {page: page for page in range(PAGES)}, [(0, 3)])
    for rank, expected in enumerate(instance(ranks[1], heads=2, content=content).pools):
        assert np.array_equal(target.pools[rank], expected)


@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_every_rank_gets_all_of_a_latent(ranks: tuple[int, int]) -> None:
    content = random_content(heads=1)[:, :, :1]
    source, target = instance(ranks[0], 1, content, latent=True), instance(ranks[1], 1, latent=True)
    assert target.regions[0].schema.page_bytes == 3 * 2 * 4 * 2  # layers, tokens, numbers, bytes
    spans = push(source, target, {page: page for page in range(PAGES)}, [(0, 2), (2, 3)])
    assert spans == 2 * ranks[1]  # nothing is cut
    assert all(np.array_equal(pool, content) for pool in target.pools)


def test_copies_share_the_work() -> None:
    routes = layout.routes(instance(8, heads=2).regions, instance(8, heads=2).regions)
    assert [route.source for route in routes] == list(range(8))


def test_equal_shards_need_one_span_per_group_of_layers() -> None:
    assert push(instance(2, content=random_content()), instance(2), {0: 0}, [(0, 2), (2, 3)]) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "b"), ("page_size", 4), ("dtype", "float16"), ("num_layers", 4), ("latent", True)],
)
def test_instances_that_cannot_exchange_pages(field: str, value: object) -> None:
    mine, theirs = instance(2).regions, instance(4).regions
    assert layout.mismatch(mine, theirs) == ""
    assert unsharded(mine) == unsharded(theirs) == SCHEMA
    other = tuple(
        msgspec.structs.replace(region, schema=msgspec.structs.replace(region.schema, **{field: value}))
        for region in theirs
    )
    assert field in layout.mismatch(mine, other)


def pushes(*rectangles: tuple[int, int, int, int]) -> list[Pushed]:
    """(first page, pages, first byte, bytes) of each push."""
    return [Pushed(1, i, at, n, (Span(0, first, size),), 0) for i, (at, n, first, size) in enumerate(rectangles)]


def test_a_manifest_covers_every_byte_of_every_page_once() -> None:
    regions = instance(1).regions
    size = regions[0].schema.page_bytes
    half = size // 2
    whole = ((0, 2, 0, half), (0, 2, half, half), (2, 3, 0, size))
    assert layout.covered(pushes(*whole), 5, regions)
    assert layout.covered(reversed(pushes(*whole)), 5, regions)
    assert not layout.covered(pushes(*whole), 6, regions)
    assert not layout.covered(pushes(*whole), 4, regions)
    assert not layout.covered(pushes(*whole[:2]), 5, regions)
    assert not layout.covered(pushes(*whole[1:]), 5, regions)
    assert not layout.covered(pushes(*whole, (1, 1, 0, half)), 5, regions)  # a byte written twice
    assert not layout.covered(pushes((0, 3, 0, half), *whole[1:]), 5, regions)
    assert layout.covered([], 0, regions)
    assert not layout.covered([], 1, regions)


def test_a_manifest_covers_every_rank() -> None:
    regions = instance(2).regions
    size = regions[0].schema.page_bytes
    first, second = (msgspec.structs.replace(pushes((0, 5, 0, size))[0], rank=rank) for rank in (0, 1))
    assert layout.covered([first, second], 5, regions)
    assert not layout.covered([first], 5, regions)
    assert not layout.covered([first, first], 5, regions)


def test_a_push_stays_within_the_pages_that_were_wanted() -> None:
    regions = instance(1).regions
    size = regions[0].schema.page_bytes
    for rectangle, inside in (
        ((0, 5, 0, size), True),
        ((4, 1, 10, size - 10), True),
        ((0, 6, 0, size), False),
        ((5, 1, 0, size), False),
        ((-1, 2, 0, size), False),
        ((0, 0, 0, size), False),
        ((0, 1, 1, size), False),
        ((0, 1, -1, size), False),
        ((0, 1, 0, 0), False),
    ):
        assert layout.fits(pushes(rectangle)[0], 5, regions) == inside, rectangle
    assert not layout.fits(msgspec.structs.replace(pushes((0, 1, 0, size))[0], rank=1), 5, regions)
