"""Worlds of prefill and decode servers that must hold. `scripts/test seeds` runs more of them by the command line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moonlang.sim.pd import checkers
from moonlang.sim.pd.network import NetSpec
from moonlang.sim.pd.transfer import TransferSpec
from moonlang.sim.pd.workload import PdCase, draw
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.run import run


def holds(case: PdCase) -> None:
    outcome = run(case, again=True)
    assert outcome.failure is None, f"seed {case.seed}: {outcome.failure}"


def alone(case: PdCase, fallback: bool, **pairing: Any) -> PdCase:
    """The case with other settings of the pairs."""
    sites = [replace(s, pairing=replace(s.pairing, fallback=fallback, **pairing)) for s in case.sites]
    return replace(case, sites=tuple(sites))


@pytest.mark.parametrize("seed", range(200_000, 200_004))
@pytest.mark.parametrize(
    "net",
    [
        NetSpec(latency_ns=(10_000, 10_000)),
        NetSpec(latency_ns=(10_000, 500_000), lost=0.4),
        NetSpec(latency_ns=(10_000, 500_000), repeated=0.8, late_copies=True),
        NetSpec(latency_ns=(1_000_000, 9_000_000), lost=0.2, repeated=0.2, quick_death=0.0),
    ],
    ids=["calm", "lossy", "repeating", "slow"],
)
def test_any_network_will_do(net: NetSpec, seed: int) -> None:
    holds(replace(draw(seed), net=net))


@pytest.mark.parametrize("seed", range(200_100, 200_104))
@pytest.mark.parametrize(
    "transfer",
    [
        TransferSpec(slice_ns=1_000, slice_pages=8),
        TransferSpec(slice_ns=50_000, slice_pages=1, failed=0.5),
        TransferSpec(slice_ns=50_000, slice_pages=1, delayed=0.9, delay_ns=300_000_000, one_sided=False),
        TransferSpec(slice_ns=50_000, slice_pages=2, corrupt=0.3),
    ],
    ids=["fast", "failing", "late", "damaging"],
)
def test_any_transfer_engine_will_do(transfer: TransferSpec, seed: int) -> None:
    holds(alone(replace(draw(seed), transfer=transfer), fallback=seed % 2 == 0, verify=True))


@pytest.mark.parametrize("seed", range(200_200, 200_206))
@pytest.mark.parametrize(
    "pairing",
    [
        {"push_groups": 8, "push_least_bytes": 0, "push_span_bytes": 1, "push_most_bytes": 1},
        {"push_least_bytes": 1 << 40},
        {"extra_leases": 0, "most_early": 1},
    ],
    ids=["by layers", "at the end", "tight"],
)
def test_settings_of_pairs_hold(pairing: dict[str, Any], seed: int) -> None:
    holds(alone(draw(seed), fallback=seed % 2 == 0, **pairing))


def test_workloads_reach_the_rare_states() -> None:
    """Every way to end, and everything that can happen to a pair, must occur."""
    ends: dict[str, int] = {}
    totals: dict[str, int] = {}
    for seed in range(100):
        world = PdWorld(draw(seed), checkers.fresh())
        world.run()
        for client in world.clients.values():
            name = "none" if client.finish is None else f"{client.finish.kind}{client.finish.status or ''}"
            ends[name] = ends.get(name, 0) + 1
        for server in world.servers.values():
            stats = server.scheduler.stats()
            found = {
                "moved": stats.pairs.total_moved,
                "failed": stats.pairs.total_failed,
                "fallbacks": stats.pairs.total_fallbacks,
                "bytes": stats.pairs.total_moved_bytes,
                "retracted": stats.total_retractions,
                "cached": stats.total_cached_tokens,
                "restarted": not server.instance.endswith(".0"),
            }
            for key, value in found.items():
                totals[f"{server.site.role} {key}"] = totals.get(f"{server.site.role} {key}", 0) + value
        totals["tried again"] = totals.get("tried again", 0) + len(world.router.attempts) - len(world.clients)
    assert set(ends) >= {"none", "stop", "length", "abort400", "abort500", "abort503", "abort504"}
    for key in ("moved", "failed", "bytes", "cached", "restarted"):
        assert totals[f"prefill {key}"] > 0
        assert totals[f"decode {key}"] > 0
    assert totals["decode moved"] > 200
    assert totals["decode fallbacks"] > 20
    assert totals["decode retracted"] > 5
    assert totals["tried again"] > 20


def test_a_case_without_its_faults_keeps_its_requests() -> None:
    case = next(case for case in map(draw, range(100)) if case.faults)
    fewer = case.keep(script.index for script in case.scripts)
    assert (fewer.scripts, fewer.faults) == (case.scripts, ())
    assert case.keep(case.indexes) == case
