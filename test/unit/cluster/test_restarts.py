"""Restarts wait longer from death to death, and a storm ends them."""

from __future__ import annotations

from moonlang.base.clock import NS_PER_S
from moonlang.cluster.restarts import Limits, Restarts

LIMITS = Limits(first_s=1, most_s=5, deaths=5, window_s=100, hopeless=3)


def waits(*deaths: tuple[int, bool]) -> list[float | None]:
    restarts = Restarts(LIMITS)
    return [restarts.died(second * NS_PER_S, was_ready=ready) for second, ready in deaths]


def test_waits_double_up_to_a_limit() -> None:
    assert waits((0, True), (1, True), (2, True), (3, True)) == [1, 2, 4, 5]


def test_a_storm_is_given_up() -> None:
    assert waits((0, True), (10, True), (20, True), (30, True), (40, True))[-1] is None


def test_rare_deaths_are_forgotten() -> None:
    assert waits((0, True), (101, True), (202, True), (303, True), (404, True), (505, True)) == [1] * 6


def test_one_that_never_came_up_is_given_up_sooner() -> None:
    assert waits((0, False), (1, False), (2, False)) == [1, 2, None]
    assert waits((0, False), (1, False), (2, True), (3, False)) == [1, 2, 4, 5]
