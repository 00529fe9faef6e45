"""Surveys of the tree: the biggest prefixes, in bounded pieces, while the tree changes."""

from __future__ import annotations

import random
from typing import Any

from moonlang.mem_cache.eviction import ORDERS
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.pool import PagePool
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.survey import MAX_DEPTH, MOST_TEXTS, TEXT_TOKENS, Survey

PAGES = 100_000


class Grove:
    """A tree that tests plant prefixes in, one token per page."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pool = PagePool(pages)
        self.cache = RadixCache(self.pool, 1, ORDERS["lru"])

    def plant(self, *tokens: int, key: str = "") -> None:
        known = self.cache.match_length(tokens, key, len(tokens))
        pages = self.cache.pages(self.cache.match(tokens, key, known)) + self.pool.take(len(tokens) - known)
        self.cache.insert(tokens, pages, key)

    def survey(self, most: int, looks: int = 7) -> dict[str, Any]:
        survey = Survey(self.cache, most)
        while not survey.advance(looks):
            pass
        return survey.report()


def test_the_heaviest_nodes_come_first_and_rest_is_what_they_leave() -> None:
    grove = Grove()
    grove.plant(*range(100))
    grove.plant(*range(60), *range(500, 520))
    grove.plant(7, 7, 7)
    found = grove.survey(4)
    assert found["parent"] == [-1, 0, 1, 1]  # the root, the shared run, and its two ends
    assert found["weight"] == [123, 120, 40, 20]
    assert found["pages"] == [0, 60, 40, 20]
    assert found["children"] == [2, 2, 0, 0]
    assert found["num_nodes"] == 4
    assert found["tokens"][1] == list(range(TEXT_TOKENS))


def test_all_nodes_of_any_tree_are_found_when_all_are_wanted() -> None:
    rng = random.Random(3)
    grove = Grove()
    for _ in range(300):
        grove.plant(*(rng.randrange(3) for _ in range(rng.randrange(1, 20))), key=rng.choice(("", "salt")))
    grove.cache.evict(200)
    grove.cache.check()
    found = grove.survey(10_000)
    nodes = {node.id: node for node in grove.cache.nodes()}
    rows = {
        number: (weight, pages)
        for parent, number, weight, pages in zip(
            found["parent"], found["id"], found["weight"], found["pages"], strict=True
        )
        if parent >= 0
    }
    assert rows == {number: (node.weight, len(node.pages)) for number, node in nodes.items()}
    assert found["num_nodes"] == len(nodes)
    assert all(parent < index for index, parent in enumerate(found["parent"]))


def test_a_survey_costs_what_it_reports_and_not_what_the_tree_holds() -> None:
    grove = Grove()
    for first in range(200):  # 200 prefixes of 100 ends each
        for last in range(100):
            grove.plant(first, 1_000_000 + last)
    survey, pieces = Survey(grove.cache, 50), 1
    while not survey.advance(100):
        pieces += 1
    assert grove.cache.num_nodes == 20_200
    assert pieces <= 60  # the 200 children of the root, then 100 for each of the 49 that are reported
    assert len(survey.report()["parent"]) == 50


def test_a_tree_that_shrinks_meanwhile() -> None:
    grove = Grove()
    for first in range(50):
        grove.plant(first, *range(100, 110))
    survey = Survey(grove.cache, 40)
    assert not survey.advance(60)
    grove.cache.evict(PAGES)
    while not survey.advance(5):
        pass
    found = survey.report()
    assert found["num_nodes"] == 0
    assert len(found["parent"]) < 20  # what was taken before


def test_depth_and_texts_are_bounded() -> None:
    grove = Grove()
    tokens: list[int] = []
    for turn in range(400):  # a conversation, a node per turn
        tokens.append(turn)
        grove.plant(*tokens)
    assert len(grove.survey(10_000)["parent"]) == MAX_DEPTH + 1
    wide = Grove()
    for first in range(2 * MOST_TEXTS):
        wide.plant(first)
    assert len(wide.survey(10_000)["tokens"]) == MOST_TEXTS


def test_without_a_tree_there_is_nothing() -> None:
    survey = Survey(NoCache(), 10)
    assert survey.advance(1)
    assert survey.report()["parent"] == []
