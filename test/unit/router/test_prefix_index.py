"""What the router remembers of the prompts it has sent to a worker."""

from __future__ import annotations

import random

from moonlang.router.prefix_index import BLOCK_CHARS, MAX_BLOCKS, PrefixIndex, path


def prompt(*blocks: str) -> bytes:
    return b"".join(block.encode() * BLOCK_CHARS for block in blocks)


def test_a_path_names_every_whole_block_and_all_before_it() -> None:
    assert path(b"x" * (BLOCK_CHARS - 1)) == []
    long, short = path(prompt("a", "b", "c") + b"rest"), path(prompt("a", "b"))
    assert long[:2] == short
    assert path(prompt("b", "b"))[1] != long[1]
    assert len(path(b"x" * (MAX_BLOCKS + 5) * BLOCK_CHARS)) == MAX_BLOCKS


def test_it_finds_the_longest_known_beginning() -> None:
    index = PrefixIndex(100 * BLOCK_CHARS)
    index.add(path(prompt("a", "b", "c")))
    assert index.match(path(prompt("a", "b", "d", "e"))) == 2
    assert index.match(path(prompt("a", "b", "c", "d"))) == 3
    assert index.match(path(prompt("b", "c"))) == 0
    assert index.match([]) == 0
    index.clear()
    assert (len(index), index.match(path(prompt("a")))) == (0, 0)


def test_the_least_recently_used_end_is_forgotten_first() -> None:
    index = PrefixIndex(4 * BLOCK_CHARS)
    index.add(path(prompt("a", "b", "c")))
    index.add(path(prompt("a", "d")))
    assert len(index) == 4
    index.add(path(prompt("a", "e")))
    assert index.match(path(prompt("a", "b", "c"))) == 2  # its end is gone, its beginning is not
    assert index.match(path(prompt("a", "d"))) == 2


def test_no_block_is_known_without_those_before_it_and_the_size_is_bounded() -> None:
    draw = random.Random(7)
    index = PrefixIndex(50 * BLOCK_CHARS)
    paths = [path(prompt(*draw.choices("abcd", k=draw.randint(1, 12)))) for _ in range(200)]
    for found in paths:
        index.add(found)
        assert len(index) <= 50
        assert index.match(found) == len(found)
        for other in draw.sample(paths, 20):
            known = [index.match(other[:length]) == length for length in range(1, len(other) + 1)]
            assert known == sorted(known, reverse=True)


def test_a_prompt_larger_than_the_whole_index_keeps_its_beginning() -> None:
    index = PrefixIndex(2 * BLOCK_CHARS)
    index.add(path(prompt("a", "b", "c", "d")))
    assert index.match(path(prompt("a", "b", "c", "d"))) == 2
