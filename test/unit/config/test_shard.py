"""What one rank holds of a model."""

from __future__ import annotations

import pytest

from moonlang.config.shard import Shard, obstacle, segments

FITTING = {"heads": 8, "kv_heads": 2, "head_dim": 16, "inner": 96, "experts": None}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("total", [8, 100, 1728])
def test_parts_cover_everything_once(total: int, size: int) -> None:
    found = [item for rank in range(size) for item in Shard(rank, size).part(total)]
    assert found == list(range(total))


@pytest.mark.parametrize(
    ("heads", "size", "parts"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_few_kv_heads_are_copied(heads: int, size: int, parts: list[list[int]]) -> None:
    assert [list(Shard(rank, size).kv_part(heads)) for rank in range(size)] == parts


def test_segments() -> None:
    assert [segments(96, size) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert segments(100) == 1


@pytest.mark.parametrize(
    ("size", "changes", "why"),
    [
        (3, {}, "1, 2, 4 or 8"),
        (4, {"heads": 6}, "attention heads"),
        (4, {"kv_heads": 3}, "KV heads"),
        (2, {"inner": 100}, "feed-forward"),
        (2, {"head_dim": 1}, "attention"),
        (4, {"experts": 2}, "experts"),
    ],
)
def test_what_cannot_be_shared(size: int, changes: dict[str, int], why: str) -> None:
    assert not obstacle(size + 1 if size == 3 else size, **FITTING)
    assert why in obstacle(size, **(FITTING | changes))


def test_quantized_columns_are_multiplied_by_fours() -> None:
    assert not obstacle(2, **(FITTING | {"inner": 112}))
    assert "32" in obstacle(2, **(FITTING | {"inner": 112}), quantized=True)
