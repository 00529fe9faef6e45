"""Seeded cases: one scheduler configuration and the scripts of its requests, drawn so that rare things are common.

`draw(seed)` is a pure function. Scripts are plain data, so that a failing case can be cut down by leaving some out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim.chain import ChainModel

EOS = (0, 1)
FIRST_TOKEN = 2
_POLICIES = ("fcfs", "lpm", "lof", "dfs-weight", "random", "priority")
_POISON_PER_REQUEST = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one client does. Times are in ns: at_ns counts from the start or, for a follow-up, from the end of `parent`,
    whose prompt and output come before `prompt`; abort_after_ns from its own sending.

    abort_after_ns, abort_at_tokens: hang up then; abort_group: together with all samples of the prompt.
    stop_at_tokens: the detokenizer finds a stop string then. poison_at: output length at which the model fails.
    """

    index: int
    rid: str
    at_ns: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    parent: int | None = None
    priority: int = 0
    timeout_ms: int = 0
    extra_key: str = ""
    logprob: LogprobSpec | None = None
    abort_after_ns: int | None = None
    abort_at_tokens: int | None = None
    abort_group: bool = False
    stop_at_tokens: int | None = None
    poison_at: int | None = None
    stream: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of the simulator. plan_ns and token_ns: what the executor takes for a plan and for each of its tokens."""

    seed: int
    config: SchedulerConfig
    model: ChainModel
    scripts: tuple[Script, ...]
    plan_ns: int
    token_ns: int
    flush_at_ns: tuple[int, ...] = ()
    abort_all_at_ns: tuple[int, ...] = ()

    @property
    def indexes(self) -> list[int]:
        """Names of everything that `keep` can leave out."""
        return [script.index for script in self.scripts]

    @property
    def settings(self) -> dict[str, SchedulerConfig]:
        """By server."""
        return {"server": self.config}

    def keep(self, indexes: Iterable[int]) -> Case:
        """The same case with only these scripts. A follow-up without its parent goes too."""
        wanted = dict.fromkeys(indexes)
        scripts: dict[int, Script] = {}
        for script in self.scripts:
            if script.index in wanted and (script.parent is None or script.parent in scripts):
                scripts[script.index] = script
        return replace(self, scripts=tuple(scripts.values()))


def draw(seed: int) -> Case:
    """Case number `seed`."""
    rng = random.Random(seed)
    config = draw_config(rng)
    model = ChainModel(vocab_size=1000, eos_token_ids=EOS, eos_per_mille=rng.choice((0, 5, 5, 20, 100, 300)))
    scripts = Scripts(rng, config, model).draw(rng.randint(4, 40))
    span = max(script.at_ns for script in scripts) + 20 * NS_PER_MS
    return Case(
        seed=seed,
        config=config,
        model=model,
        scripts=tuple(scripts),
        plan_ns=rng.choice((200_000, NS_PER_MS, 5 * NS_PER_MS)),
        token_ns=rng.choice((0, 5_000, 50_000)),
        flush_at_ns=tuple(sorted(rng.randrange(span) for _ in range(rng.choice((0, 0, 1, 6))))),
        abort_all_at_ns=(rng.randrange(span),) if rng.random() < 0.03 else (),
    )


def draw_config(rng: random.Random) -> SchedulerConfig:
    """A scheduler's settings."""
    page_size = rng.choice((1, 1, 2, 3, 4, 8, 16))
    context = rng.choice((24, 48, 96, 160))
    # From pools in which one request at a time has room to pools in which everything stays cached.
    pool_tokens = int(context * rng.choice((0.6, 1.0, 1.3, 1.6, 2.0, 4.0, 20.0)))
    chunk = rng.choice((None, 1, 5, 16, 16, 33, 64))
    policy = rng.choice(_POLICIES)
    return SchedulerConfig(
        num_pages=2 + pool_tokens // page_size,
        page_size=page_size,
        context_length=context,
        max_running=rng.choice((1, 2, 3, 5, 8, 16)),
        max_queued=rng.choice((None, None, None, None, 2, 12)),
        chunk_tokens=chunk,
        max_prefill_tokens=rng.choice((8, 64, 1024)),
        prefill_max_requests=rng.choice((None, None, 1, 2)),
        policy=policy,
        eviction=rng.choice(("lru", "lru", "lfu")),
        radix=rng.random() < 0.85,
        depth=rng.choice((1, 2, 2, 3)),
        eos_token_ids=EOS,
        conservativeness=rng.choice((0.0, 0.0, 0.3, 1.0)),
        priority=policy == "priority" or rng.random() < 0.2,
        priority_low_first=rng.random() < 0.3,
        preempt=rng.random() < 0.7,
        preempt_gap=rng.choice((0, 0, 1, 10)),
        prefix_wait_tokens=rng.choice((4, 32)),
        seed=rng.randrange(1000),
    )


class Scripts:
    """Draws the scripts of one case. Each chance is switched on or off for the whole case, so that extremes occur."""

    def __init__(self, rng: random.Random, config: SchedulerConfig, model: ChainModel) -> None:
        self._rng = rng
        self._config = config
        self._model = model
        self._alphabet = rng.choice((2, 3, 900))
        self._stems = [
            self._tokens(rng.randint(1, max(1, config.context_length // 3))) for _ in range(rng.randint(1, 4))
        ]
        self._keys = ("",) if rng.random() < 0.6 else ("", "a", "b")
        self._mean_gap_ns = rng.choice((0, 300_000, 3 * NS_PER_MS, 30 * NS_PER_MS))
        self._abort = self._chance(0.05, 0.3, 0.8)
        self._follow_up = self._chance(0.2, 0.6)
        self._samples = self._chance(0.1, 0.4)
        self._timeout = self._chance(0.1, 0.5)
        self._grammar = self._chance(0.1, 0.4)
        self._logprob = self._chance(0.1, 0.4)
        self._stop = self._chance(0.1, 0.5)
        self._stop_string = self._chance(0.1, 0.5)
        self._ignore_eos = self._chance(0.2, 1.0)

    def draw(self, count: int) -> list[Script]:
        rng = self._rng
        scripts: list[Script] = []
        now_ns = 0
        while len(scripts) < count:
            now_ns += int(rng.expovariate(1 / self._mean_gap_ns)) if self._mean_gap_ns else 0
            parent = rng.randrange(len(scripts)) if scripts and rng.random() < self._follow_up else None
            samples = rng.randint(2, 4) if rng.random() < self._samples else 1
            group = len(scripts)
            prompt = self._tokens(rng.randint(1, 8)) if parent is not None else self._prompt()
            key = scripts[parent].extra_key if parent is not None and rng.random() < 0.8 else rng.choice(self._keys)
            delay_ns = rng.randrange(5 * NS_PER_MS) if parent is not None else now_ns
            for number in range(samples):
                script = self._script(len(scripts), f"r{group:04d}-{number}", prompt, parent, key, delay_ns)
                scripts.append(script)
        return scripts

    def _script(
        self, index: int, rid: str, prompt: tuple[int, ...], parent: int | None, key: str, at_ns: int
    ) -> Script:
        rng = self._rng
        chance = rng.random
        return Script(
            index=index,
            rid=rid,
            at_ns=at_ns,
            prompt=prompt,
            sampling=self._sampling(index, prompt, parent),
            parent=parent,
            priority=rng.choice((-20, -1, 0, 0, 1, 20)),
            timeout_ms=rng.choice((1, 10, 100)) if chance() < self._timeout else 0,
            extra_key=key,
            logprob=self._logprob_spec(len(prompt)) if chance() < self._logprob else None,
            abort_after_ns=int(10 ** rng.uniform(3, 8)) if chance() < self._abort else None,
            abort_at_tokens=rng.randint(1, 20) if chance() < self._abort / 2 else None,
            abort_group=chance() < 0.2,
            stop_at_tokens=rng.randint(1, 20) if chance() < self._stop_string else None,
            stream=chance() < 0.8,
            poison_at=rng.randrange(10) if chance() < _POISON_PER_REQUEST else None,
        )

    def _sampling(self, index: int, prompt: tuple[int, ...], parent: int | None) -> SamplingParams:
        rng = self._rng
        longest = rng.choice((4, 16, 64, 64, 300))
        most = None if rng.random() < 0.05 else rng.randint(0, longest)
        grammar = GrammarSpec(rng.choice(("regex", "regex", "ebnf")), str(rng.randint(1, 30)))
        sampling = SamplingParams(
            max_new_tokens=most,
            min_new_tokens=min(rng.choice((0, 0, 0, 3, 10)), 300 if most is None else most),
            ignore_eos=rng.random() < self._ignore_eos,
            grammar=grammar if rng.random() < self._grammar else None,
            seed=index + 1,
        )
        if parent is None and rng.random() < self._stop:
            # A stop id that will come: some token of the right answer.
            answer, _ = self._model.answer(prompt, sampling, most=rng.randint(1, 20))
            sampling = msgspec.structs.replace(sampling, stop_token_ids=(answer[-1],))
        return sampling

    def _logprob_spec(self, prompt_len: int) -> LogprobSpec:
        return LogprobSpec(start=self._rng.choice((-1, 0, prompt_len // 2, prompt_len - 1)))

    def _prompt(self) -> tuple[int, ...]:
        """Nested: a prefix of one of the case's stems, or all of it, and something of its own."""
        rng = self._rng
        if rng.random() < 0.01:
            return ()
        stem = rng.choice(self._stems)
        if rng.random() < 0.5:
            stem = stem[: rng.randint(0, len(stem))]
        context = self._config.context_length
        longest = context + 2 if rng.random() < 0.05 else rng.choice((2, 10, context // 2))
        return stem + self._tokens(rng.randint(0 if stem else 1, longest))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple([FIRST_TOKEN + self._rng.randrange(self._alphabet) for _ in range(count)])

    def _chance(self, *values: float) -> float:
        """One of `values`, or never."""
        return self._rng.choice((0.0, *values))


def compile_ns(spec: GrammarSpec) -> int:
    """How long a grammar takes to compile."""
    return int(spec.source) % 3 * 10 * NS_PER_MS


def compile_error(spec: GrammarSpec) -> str:
    """The simulator's EBNF grammars are those that do not compile."""
    return "the grammar is wrong" if spec.kind == "ebnf" else ""
