"""Seeded cases of several servers: their settings, the clients' scripts, and what goes wrong when."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard
from moonlang.scheduler.settings import PairingConfig, SchedulerConfig
from moonlang.sim.chain import ChainModel
from moonlang.sim.pd.network import NetSpec
from moonlang.sim.pd.transfer import TransferSpec
from moonlang.sim.workload import EOS, Script, Scripts, draw_config

Role = Literal["prefill", "decode"]
FaultKind = Literal["kill", "hang", "reset", "clog", "router"]

FAULT_INDEX = 1000  # faults are numbered from here on, scripts below: one numbering for what can be left out
_SHORT_NS = 10_000 * NS_PER_MS  # a patience that may run out while messages are repeated
_FINGERPRINT, _OTHER_FINGERPRINT = "w1", "w2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An address and the server behind it. pairing: its card names no instance yet, each start draws one."""

    name: str
    role: Role
    config: SchedulerConfig
    pairing: PairingConfig

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        return self.pairing.card.regions[0].schema.fingerprint

    def settings(self, generation: int) -> SchedulerConfig:
        """Of the server that is started here as number `generation`."""
        card = msgspec.structs.replace(self.pairing.card, instance=f"{self.name}.{generation}")
        return replace(self.config, pairing=replace(self.pairing, card=card))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """kill: the server at `site` dies and a new one starts there after duration_ns. hang: it is stopped for so long.
    reset, clog: the connections between `site` and `peer` break, or carry nothing for so long. router: it dies, and all
    clients lose their connections."""

    index: int
    at_ns: int
    kind: FaultKind
    site: str
    peer: str = ""
    duration_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """retries: further attempts for a request that has failed without an answer. cancels: the failure of one half ends
    the other at once. late_ns: one half of a request may come so much later than the other, and so may its end."""

    retries: int
    cancels: bool
    late_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PdCase:
    """One run. schema: of a whole page, all ranks together. plan_ns, token_ns: what an executor takes for a plan and
    for each of its tokens."""

    seed: int
    schema: KvSchema
    model: ChainModel
    sites: tuple[Site, ...]
    scripts: tuple[Script, ...]
    faults: tuple[Fault, ...]
    net: NetSpec
    transfer: TransferSpec
    router: RouterSpec
    plan_ns: int
    token_ns: int

    @property
    def indexes(self) -> list[int]:
        """Names of everything that `keep` can leave out."""
        return [script.index for script in self.scripts] + [fault.index for fault in self.faults]

    @property
    def is_unreliable(self) -> bool:
        """Whether any request may fail so that it has to be sent again, faults of servers and connections apart."""
        bounded = any(site.config.max_queued is not None for site in self.sites)
        weights = dict.fromkeys(site.fingerprint for site in self.sites)
        hurried = any(site.pairing.patience_ns < _SHORT_NS for site in self.sites)
        slow = hurried and (self.net.lost > 0 or self.transfer.delayed > 0)
        failing = self.transfer.failed > 0 or self.transfer.corrupt > 0
        return failing or slow or bounded or self.forgets or len(weights) > 1

    @property
    def forgets(self) -> bool:
        """Whether a prefill instance may have to forget what it has heard of requests that have not come."""
        return any(site.pairing.most_early < len(self.scripts) for site in self.sites)

    @property
    def settings(self) -> dict[str, SchedulerConfig]:
        """By server."""
        return {site.name: site.settings(0) for site in self.sites}

    def keep(self, indexes: Iterable[int]) -> PdCase:
        """The same case with only these scripts and faults. A follow-up without its parent goes too."""
        wanted = dict.fromkeys(indexes)
        scripts: dict[int, Script] = {}
        for script in self.scripts:
            if script.index in wanted and (script.parent is None or script.parent in scripts):
                scripts[script.index] = script
        faults = tuple(fault for fault in self.faults if fault.index in wanted)
        return replace(self, scripts=tuple(scripts.values()), faults=faults)


def draw(seed: int) -> PdCase:
    """Case number `seed`: a pure function."""
    rng = random.Random(f"pd {seed}")
    base = draw_config(rng)
    schema = KvSchema(
        num_layers=rng.choice((1, 2, 4, 5)),
        num_kv_heads=rng.choice((1, 1, 4)),
        head_dim=1,
        page_size=base.page_size,
        dtype="int8",
        itemsize=1,
        fingerprint=_FINGERPRINT,
    )
    model = ChainModel(vocab_size=1000, eos_token_ids=EOS, eos_per_mille=rng.choice((0, 5, 5, 20, 100)))
    scripts = _draw_scripts(rng, base, model)
    trouble = rng.choice(("none", "none", "messages", "transfers", "servers", "servers", "all"))
    transfer = _draw_transfer(rng, troubled=trouble in ("transfers", "all"))
    net = _draw_net(rng, troubled=trouble in ("messages", "all"))
    sites = _draw_sites(rng, base, schema, corrupt=transfer.corrupt > 0, late_copies=net.late_copies)
    span_ns = max(script.at_ns for script in scripts) + 30 * NS_PER_MS
    return PdCase(
        seed=seed,
        schema=schema,
        model=model,
        sites=sites,
        scripts=tuple(scripts),
        faults=_draw_faults(rng, sites, span_ns) if trouble in ("servers", "all") else (),
        net=net,
        transfer=transfer,
        router=RouterSpec(
            retries=rng.choice((0, 0, 1, 3)),
            cancels=rng.random() < 0.5,
            late_ns=rng.choice((0, 1, 50, 300)) * NS_PER_MS,
        ),
        plan_ns=rng.choice((200_000, NS_PER_MS, 5 * NS_PER_MS)),
        token_ns=rng.choice((0, 5_000, 50_000)),
    )


def _draw_scripts(rng: random.Random, base: SchedulerConfig, model: ChainModel) -> list[Script]:
    """In some cases many answers end with their first token, which comes from another server than the second."""
    scripts = Scripts(rng, base, model).draw(rng.randint(2, 14))
    ending = rng.choice(("", "", "", "", "abort_at_tokens", "stop_at_tokens"))
    if not ending:
        return scripts
    return [replace(s, stream=True, **{ending: 1}) if rng.random() < 0.5 else s for s in scripts]


def _draw_sites(
    rng: random.Random, base: SchedulerConfig, schema: KvSchema, *, corrupt: bool, late_copies: bool
) -> tuple[Site, ...]:
    """Servers with settings of their own; page size and context are common, and any pool holds the longest sequence."""
    fallback = rng.random() < 0.4
    patience_ns = rng.choice((60_000, 60_000, 3_000)) * NS_PER_MS
    bounded = rng.random() < 0.2
    # Late copies of messages are recognised by what is remembered of their rooms.
    most_early = rng.choice((4096, 4096, 4096, 2)) if not late_copies else 4096
    ranks = {"prefill": 1, "decode": 1}
    if schema.num_kv_heads > 1:
        ranks = {"prefill": rng.choice((1, 2, 4)), "decode": rng.choice((1, 2, 4))}
    counts: tuple[tuple[Role, int], ...] = (("prefill", rng.choice((1, 2, 2))), ("decode", rng.choice((1, 1, 2))))
    roles: list[Role] = [role for role, count in counts for _ in range(count)]
    sites: list[Site] = []
    for number, role in enumerate(roles):
        name = f"{role[0]}{number}"
        pages = -(-base.context_length // base.page_size)
        own = draw_config(rng)
        config = replace(
            own,
            max_queued=own.max_queued if bounded else None,
            max_running=own.max_running if role == "prefill" else rng.choice((1, 2, 4, 8, 16)),
            conservativeness=own.conservativeness if role == "prefill" else rng.choice((0.0, 0.0, 1.0)),
            page_size=base.page_size,
            context_length=base.context_length,
            num_pages=2 + int(pages * rng.choice((1.0, 1.1, 1.2, 1.3, 1.6, 2.0, 4.0, 20.0))),
            reserved_tokens=rng.choice((0, 0, 0, 16)),
        )
        fingerprint = _OTHER_FINGERPRINT if rng.random() < 0.02 else _FINGERPRINT
        pairing = PairingConfig(
            mode=role,
            card=_card(name, msgspec.structs.replace(schema, fingerprint=fingerprint), ranks[role], config.num_pages),
            patience_ns=patience_ns,
            most_early=most_early,
            push_groups=rng.choice((1, 2, 4)),
            push_least_bytes=rng.choice((0, 0, 100, 1 << 20)),
            push_span_bytes=rng.choice((1, 1, 1, 64)),
            push_most_bytes=rng.choice((1, 64, 1 << 20)),
            verify=corrupt or rng.random() < 0.8,
            fallback=fallback,
            extra_leases=rng.choice((0, 2, 16)),
        )
        sites.append(Site(name=name, role=role, config=config, pairing=pairing))
    return tuple(sites)


def _card(name: str, schema: KvSchema, ranks: int, num_pages: int) -> KvCard:
    """Regions of `ranks` ranks that share the heads of `schema` evenly."""
    heads = schema.num_kv_heads // ranks
    shard = msgspec.structs.replace(schema, num_kv_heads=heads)
    regions = tuple(
        KvRegion(address=0, stride=shard.page_bytes, num_pages=num_pages, schema=shard, first_head=rank * heads)
        for rank in range(ranks)
    )
    return KvCard(instance="", backend="sim", host=name, regions=regions, sessions=("",) * ranks, handles=("",) * ranks)


def _draw_faults(rng: random.Random, sites: tuple[Site, ...], span_ns: int) -> tuple[Fault, ...]:
    """When they hit, something should be going on: within the time in which requests arrive, or a little later."""
    prefills = [site.name for site in sites if site.role == "prefill"]
    decodes = [site.name for site in sites if site.role == "decode"]
    faults: list[Fault] = []
    every: tuple[FaultKind, ...] = ("kill", "hang", "reset", "clog", "router")
    kinds = rng.choice((every[:1], every[1:2], every[2:4], every))
    for number in range(rng.randint(1, 4)):
        kind = rng.choice(kinds)
        on_link = kind in ("reset", "clog")
        faults.append(
            Fault(
                index=FAULT_INDEX + number,
                at_ns=rng.randrange(span_ns),
                kind=kind,
                site=rng.choice(prefills if on_link else prefills + decodes),
                peer=rng.choice(decodes) if on_link else "",
                duration_ns=rng.choice((5, 50, 300, 1500, 4000)) * NS_PER_MS,
            )
        )
    return tuple(faults)


def _draw_net(rng: random.Random, *, troubled: bool) -> NetSpec:
    return NetSpec(
        latency_ns=rng.choice(((20_000, 20_000), (10_000, 500_000), (NS_PER_MS, 5 * NS_PER_MS))),
        lost=rng.choice((0.0, 0.05, 0.3)) if troubled else 0.0,
        repeated=rng.choice((0.05, 0.3)) if troubled else 0.0,
        late_copies=troubled and rng.random() < 0.5,
        quick_death=rng.choice((1.0, 0.5)),
    )


def _draw_transfer(rng: random.Random, *, troubled: bool) -> TransferSpec:
    return TransferSpec(
        slice_ns=rng.choice((5_000, 100_000, 2 * NS_PER_MS)),
        slice_pages=rng.choice((1, 2, 8)),
        failed=rng.choice((0.0, 0.05, 0.3)) if troubled else 0.0,
        delayed=rng.choice((0.0, 0.1, 0.5)) if troubled else 0.0,
        delay_ns=rng.choice((10, 300)) * NS_PER_MS,
        corrupt=rng.choice((0.0, 0.0, 0.1)) if troubled else 0.0,
        one_sided=rng.random() < 0.5,
    )
