"""Cases with lower tiers: several servers that are asked the same things, one after the other or at once."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moonlang.base.clock import NS_PER_MS
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import workload
from moonlang.sim.tiers.channels import Weather
from moonlang.sim.workload import Case, Script


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """begin_ns: when it starts. end_ns: when it is killed, None: never. crowded_at_ns: when its device pool loses all
    that nobody reads."""

    tiers: TierConfig
    weather: Weather
    crowded_at_ns: tuple[int, ...] = ()
    begin_ns: int = 0
    end_ns: int | None = None


@dataclass(frozen=True, slots=True)
class TierCase:
    """`base` is what each of the servers is asked. store_pages: how many fit into the store."""

    base: Case
    servers: tuple[Server, ...]
    store_pages: int

    @property
    def seed(self) -> int:
        return self.base.seed

    @property
    def indexes(self) -> list[int]:
        return self.base.indexes

    @property
    def settings(self) -> dict[str, SchedulerConfig]:
        return {f"server {i}": self.config(server) for i, server in enumerate(self.servers)}

    def config(self, server: Server) -> SchedulerConfig:
        return replace(self.base.config, radix=True, tiers=server.tiers)

    def keep(self, indexes: Iterable[int]) -> TierCase:
        return replace(self, base=self.base.keep(indexes))


def draw(seed: int) -> TierCase:
    """Case number `seed`."""
    rng = random.Random(f"tiers {seed}")
    base = workload.draw(seed)
    round_ns = max(script.at_ns for script in base.scripts) + rng.choice((20, 500)) * NS_PER_MS
    rounds = rng.choice((1, 2, 4))
    base = replace(base, scripts=_repeated(base.scripts, rounds, round_ns))
    span_ns = rounds * round_ns
    page = base.config.page_size
    servers = []
    for i in range(rng.randint(1, 3)):
        tiers = TierConfig(
            host_slots=rng.choice((0, 8, 64, 4 * base.config.num_pages)),
            store=rng.random() < 0.85,
            write_policy=rng.choice(("write_through", "write_through", "write_through_selective", "write_back")),
            prefetch_policy=rng.choice(("timeout", "best_effort", "wait_complete")),
            threshold_tokens=rng.choice((page, 4 * page)),
            timeout_ns=rng.choice((5, 50, 1000)) * NS_PER_MS,
            timeout_ki_token_ns=rng.choice((0, 250)) * NS_PER_MS,
            batch_pages=rng.choice((1, 3, 8, 64)),
        )
        servers.append(
            Server(
                tiers=tiers,
                weather=_weather(rng),
                crowded_at_ns=tuple(sorted(rng.randrange(span_ns) for _ in range(rng.choice((0, 3, 20))))),
                begin_ns=i * rng.choice((0, span_ns // 3, span_ns)),
                end_ns=None if rng.random() < 0.8 else i * span_ns + rng.randrange(span_ns),
            )
        )
    return TierCase(base=base, servers=tuple(servers), store_pages=rng.choice((4, 100, 100_000)))


def _repeated(scripts: tuple[Script, ...], rounds: int, round_ns: int) -> tuple[Script, ...]:
    """All of it again and again, under other names."""
    return tuple(
        replace(
            script,
            index=script.index + i * len(scripts),
            rid=f"{i}.{script.rid}" if i else script.rid,
            at_ns=script.at_ns if script.parent is not None else script.at_ns + i * round_ns,
            parent=None if script.parent is None else script.parent + i * len(scripts),
        )
        for i in range(rounds)
        for script in scripts
    )


def _weather(rng: random.Random) -> Weather:
    """Half of them are fine."""
    is_bad = rng.random() < 0.5
    return Weather(
        host_ns=rng.choice((1_000, 100_000, 3 * NS_PER_MS)),
        store_ns=rng.choice((100_000, 2 * NS_PER_MS, 40 * NS_PER_MS)),
        down=rng.choice((1, 1, 100)),
        jitter=rng.choice((0.0, 1.0, 10.0)),
        hang=0.05 * is_bad * rng.random(),
        fail=0.4 * is_bad * rng.random(),
        lie=0.3 * is_bad * rng.random(),
        decay=0.1 * is_bad * rng.random(),
        forget=0.1 * is_bad * rng.random(),
    )
