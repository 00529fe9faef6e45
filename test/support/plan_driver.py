"""A very small scheduler for tests: random pages, chunks, mixed rows, two plans in flight, retraction."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from moonlang.core.kv import KvSchema
from moonlang.core.plan import Row, RowResult, SlotStart, StepPlan, StepResult, TokenLogprob
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams


class Steps(Protocol):
    """Who computes plans: a ModelRunner, or what stands before one."""

    schema: KvSchema
    num_pages: int
    max_slots: int

    def run(self, plan: StepPlan) -> StepResult: ...


@dataclass
class Job:
    """One request. tokens: prompt and output known so far; planned: positions in some plan; shared: borrowed pages."""

    tokens: list[int]
    params: SamplingParams
    new_tokens: int
    logprob: LogprobSpec | None = None
    shared: list[int] = field(default_factory=list)
    prompt_len: int = 0
    slot: int = -1
    epoch: int = 0
    planned: int = 0
    pages: list[int] = field(default_factory=list)
    output: list[TokenLogprob] = field(default_factory=list)
    prompt: list[TokenLogprob] = field(default_factory=list)
    error: str = ""
    ended: bool = False

    @property
    def done(self) -> bool:
        return bool(self.error) or self.ended or len(self.tokens) - self.prompt_len >= self.new_tokens


class PlanDriver:
    """Plans jobs until they are done. chunk: prompt tokens per step and job. Results come one plan late."""

    def __init__(self, runner: Steps, chunk: int = 1 << 20, depth: int = 2, seed: int = 0) -> None:
        self.runner = runner
        self.chunk = chunk
        self.depth = depth
        self.random = random.Random(seed)
        self.page = runner.schema.page_size
        self.free_pages = list(range(1, runner.num_pages))
        self.random.shuffle(self.free_pages)
        self.free_slots = list(range(runner.max_slots))
        self.random.shuffle(self.free_slots)
        self.jobs: list[Job] = []
        self.starts: list[SlotStart] = []
        self.in_flight: deque[tuple[list[Job], tuple[RowResult, ...]]] = deque()
        self.plan_id = 0

    def add(self, job: Job) -> Job:
        """Admit a job, or admit it again after `retract`."""
        job.prompt_len = job.prompt_len or len(job.tokens)
        job.slot, job.epoch = self.free_slots.pop(), job.epoch + 1
        job.pages, job.planned = list(job.shared), len(job.shared) * self.page
        self.starts.append(SlotStart(job.slot, job.epoch, job.prompt_len, tuple(job.tokens), job.params, job.logprob))
        self.jobs.append(job)
        return job

    def retract(self, job: Job) -> None:
        """Take everything from a job but the tokens known so far; results in flight are void."""
        self.jobs.remove(job)
        job.epoch += 1
        self.free_pages += job.pages[len(job.shared) :]
        self.free_slots.append(job.slot)
        self.random.shuffle(self.free_pages)

    def run(self) -> None:
        """Until every job is done."""
        while self.jobs or self.in_flight:
            self.step()

    def step(self) -> None:
        """Run one more plan, if there is something to do, and commit the oldest that is still in flight."""
        planned = [(job, row) for job in self.jobs if (row := self._row(job)) is not None]
        planned.sort(key=lambda pair: bool(pair[1].tokens) and pair[1].length > 1)
        if planned or self.starts:
            plan = StepPlan(self.plan_id, 0, tuple(self.starts), tuple(row for _, row in planned))
            self.plan_id += 1
            self.starts.clear()
            self.in_flight.append(([job for job, _ in planned], self.runner.run(plan).rows))
        if len(self.in_flight) >= self.depth or not planned:
            self._commit()

    def _row(self, job: Job) -> Row | None:
        end = len(job.tokens)
        if job.planned < end:
            last = min(end, job.planned + self.chunk)
            tokens, sample = tuple(job.tokens[job.planned : last]), last == end
        elif job.planned < job.prompt_len + job.new_tokens - 1:
            last, tokens, sample = job.planned + 1, (), True
        else:
            return None
        known = len(job.pages) if job.planned > len(job.shared) * self.page else 0
        while len(job.pages) * self.page < last:
            job.pages.append(self.free_pages.pop())
        row = Row(job.slot, job.epoch, job.planned, last - job.planned, tokens, sample, known, tuple(job.pages[known:]))
        job.planned = last
        return row

    def _commit(self) -> None:
        if not self.in_flight:
            return
        jobs, results = self.in_flight.popleft()
        for job, result in zip(jobs, results, strict=True):
            if job.epoch != result.epoch or job.done:
                continue
            job.tokens += result.tokens
            job.output += result.output
            job.prompt += result.prompt
            job.ended, job.error = result.ended, result.error
            if job.done:
                self.retract(job)
