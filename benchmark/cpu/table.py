"""From the rounds of all engines to one row per figure: medians, ratios, and whether MoonLang reaches what it must."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cpu.cases import LESS_IS_BETTER, STARTUP, VARIANTS, Case, Demand

OURS = "moonlang"
QUIET = 0.05  # rounds in which strangers took more of the CPU count only where there is no better one


class Measured(Protocol):
    """What is read of `compare.Engine`."""

    name: str
    start_s: list[float]
    beyond_mb: float | None
    figures: dict[str, list[dict[str, Any]]]


def rows(shape: str, cases: Mapping[str, Case], found: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row per case and figure, and for start-up and memory of the checkpoint."""
    table: list[dict[str, Any]] = []
    for name, case in cases.items():
        for figure, demand in case.figures.items():
            medians = {one.name: _median(one.figures[name], figure) for one in found if one.figures.get(name)}
            quiet = {one.name: _quiet(one.figures[name]) for one in found if one.figures.get(name)}
            table.append(_row(name, figure, medians, demand, variants=bool(case.options)) | {"quiet_rounds": quiet})
    starts = {one.name: statistics.median(one.start_s) for one in found if one.start_s}
    beyond = {one.name: one.beyond_mb for one in found if one.beyond_mb is not None}
    if not any(case.options for case in cases.values()):
        table += [_row(shape, figure, medians, STARTUP[figure]) for figure, medians in _startup(starts, beyond)]
    return table


def shown(row: dict[str, Any]) -> str:
    values = " ".join(f"{name}={value:.4g}" for name, value in row["medians"].items())
    better = " ".join(f"{value:.2f}x {name}" for name, value in row["ratios"].items())
    return f"{row['case']:11} {row['figure']:12} {values:50} {better:28} {row['verdict']}"


def _startup(starts: dict[str, float], beyond: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    return [("start_s", starts), ("beyond_mb", beyond)]


def _quiet(found: list[dict[str, Any]]) -> str:
    """Of the rounds, how many were quiet."""
    return f"{sum(row['noise'] <= QUIET for row in found)}/{len(found)}"


def _median(found: list[dict[str, Any]], figure: str) -> float:
    quiet = [row[figure] for row in found if row["noise"] <= QUIET]
    return statistics.median(quiet or [row[figure] for row in found])


def _row(
    case: str, figure: str, medians: Mapping[str, float], demand: Demand, *, variants: bool = False
) -> dict[str, Any]:
    """variants: MoonLang is compared with itself, and how much better each variant is counts."""
    ours = medians.get(OURS)
    ratios: dict[str, float] = {}
    if ours is not None and ours > 0:
        for name, value in medians.items():
            if name != OURS and value > 0:
                ratios[name] = _better(figure, value, ours) if variants else _better(figure, ours, value)
    verdict = _variant_verdict(ratios) if variants else _verdict(ours, ratios, demand)
    return {"case": case, "figure": figure, "medians": dict(medians), "ratios": ratios, "verdict": verdict}


def _better(figure: str, one: float, other: float) -> float:
    """By how much `one` is better."""
    return other / one if figure in LESS_IS_BETTER else one / other


def _verdict(ours: float | None, ratios: dict[str, float], demand: Demand) -> str:
    if ours is None:
        return "not measured"
    checks: list[tuple[bool, str]] = []
    if demand.at_most is not None:
        checks.append((ours <= demand.at_most, f"at most {demand.at_most:g}"))
    if demand.than in ratios:
        checks.append((ratios[demand.than] >= demand.times, f"{demand.times:g}x {demand.than}"))
    return _said(checks)


def _variant_verdict(ratios: dict[str, float]) -> str:
    return _said([(value >= VARIANTS[name], f"{VARIANTS[name]:g}x {name}") for name, value in ratios.items()])


def _said(checks: list[tuple[bool, str]]) -> str:
    return ", ".join(f"{'reached' if fine else 'MISSED'} {what}" for fine, what in checks)
