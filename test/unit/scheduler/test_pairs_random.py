"""Random histories of one pair of instances: messages lost, repeated and reordered, operations that fail, clients that
hang up, peers that fall silent. The ledgers are checked after every step (by the bench), everything else at the end."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pair_bench import MS, PATIENCE_NS, Half, Pair, answer

from moonlang.core.pairing import Linked, Push, Unreachable
from moonlang.core.ticket import Outcome


class History:
    """Draws what happens next. Messages of one room stay in order, those of different rooms overtake each other."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        shared: dict[str, Any] = {
            "page_size": rng.choice((1, 4)),
            "radix": rng.random() < 0.8,
            "depth": rng.choice((1, 2)),
            "chunk_tokens": rng.choice((None, 5, 8, 16)),
            "max_running": rng.choice((1, 2, 8)),
            "conservativeness": rng.choice((0.0, 1.0)),
            "priority": rng.random() < 0.3,
            "preempt_gap": 1,
        }
        self.fallback = rng.random() < 0.5
        self.pair = Pair(
            Half(
                "prefill",
                "P1",
                rng.choice((1, 2, 4)),
                num_pages=rng.choice((34, 60, 200)),
                push_least_bytes=rng.choice((0, 1 << 40)),
                push_most_bytes=rng.choice((1, 300, 1 << 20)),
                **shared,
            ),
            Half(
                "decode",
                "D1",
                rng.choice((1, 2, 4)),
                num_pages=rng.choice((34, 60, 200)),
                fallback=self.fallback,
                verify=rng.random() < 0.9,
                extra_leases=rng.choice((0, 2)),
                reserved_tokens=rng.choice((0, 4)),
                **shared,
            ),
        )
        self.loss = rng.choice((0.0, 0.02, 0.1))  # of messages, which repeats make up for
        self.faults = rng.choice((0.0, 0.0, 0.02, 0.1))  # of anything else, which may cost a request
        self.weights = rng.choice(((20, 20, 15), (20, 5, 15), (10, 20, 5)))
        self.stems = rng.choice(((0, 8, 9), (16,)))
        self.harmless = not self.faults
        self.prompts: dict[str, tuple[list[int], int]] = {}

    def run(self) -> None:
        for _ in range(400):
            self.step()
        self.loss = self.faults = 0.0
        for _ in range(200):
            self.pair.run()
            if all(half.scheduler.idle for half in self.pair.halves):
                break
            self.pair.wait(200 * MS)
        for _ in range(2 * PATIENCE_NS // (1000 * MS)):
            self.pair.wait(1000 * MS)
            self.pair.run()
        self.judge()

    def judge(self) -> None:
        self.pair.assert_empty()
        if self.harmless:
            assert [half.scheduler.stats().pairs.total_failed for half in self.pair.halves] == [0, 0]
        for rid, (prompt, count) in self.prompts.items():
            end = self.pair.decode.end(rid)
            assert end is not None, rid
            longest = (self.pair.decode.scheduler.config.num_pages - 1) * self.pair.decode.page_size
            right = answer(prompt, min(count, longest - len(prompt)))
            said = self.pair.decode.tokens(rid)
            assert said == right[: len(said)]
            if end[0] == "length":
                assert said == right
            assert end[0] == "length" or not self.harmless
            assert self.pair.prefill.end(rid) is not None, rid
            early = self.pair.prefill.tokens(rid)
            assert early == answer(prompt, count)[: len(early)]

    def step(self) -> None:
        rng, pair = self.rng, self.pair
        half = rng.choice(pair.halves)
        action = rng.choices(
            ("add", "link", "message", "operation", "plan", "wait", "fault"),
            (3, 6, *self.weights, 5, 60 * self.faults),
        )[0]
        if action == "add" and len(self.prompts) < 25:
            self.add()
        elif action == "link" and pair.decode.opened:
            pair.decode.hear(Linked(pair.decode.opened.pop(0).room, pair.prefill.card))
        elif action == "message" and half.out:
            self.deliver(half)
        elif action == "operation" and half.ops:
            self.operate(half)
        elif action == "plan" and half.plans:
            half.run_plan(self.between)
        elif action == "wait":
            half.wait(rng.choice((1, 50, 250) if self.harmless else (1, 50, 250, 3000)) * MS)
        elif action == "fault":
            self.fault(half)

    def add(self) -> None:
        rng = self.rng
        rid = f"r{len(self.prompts)}"
        stem = [5] * rng.choice(self.stems)
        prompt = stem + [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        count = rng.choice((0, 1, 2, 3, 5, 12))
        self.prompts[rid] = prompt, count
        priority = rng.randrange(3)
        room = None if rng.random() < 0.1 else len(self.prompts)  # without a room each serves it alone
        halves = list(self.pair.halves)
        rng.shuffle(halves)
        for half in halves:
            half.add(rid, prompt, room, count, priority=priority)
            if rng.random() < 0.3:
                self.between()

    def between(self) -> None:
        """While a plan runs the world goes on."""
        for half in self.pair.halves:
            if half.ops and self.rng.random() < 0.7:
                self.operate(half)
            if half.out and self.rng.random() < 0.5:
                self.deliver(half)

    def deliver(self, half: Half) -> None:
        """The oldest message of some room."""
        at = self.rng.randrange(len(half.out))
        room = half.out[at][1].room
        first = next(i for i, (_, body) in enumerate(half.out) if body.room == room)
        if self.rng.random() < self.loss:
            instance, body = half.out[first]
            half.out.insert(first, (instance, body))  # a message that comes twice
        if self.rng.random() < self.loss:
            del half.out[first]
            return
        self.pair.carry(half, first)

    def operate(self, half: Half) -> None:
        number = self.rng.choice(list(half.ops))
        cancelled = number in half.cancelled and self.rng.random() < 0.5
        failed = isinstance(half.ops[number], Push) and self.rng.random() < self.faults
        outcome = Outcome.CANCELLED if cancelled else Outcome.FAILED if failed else Outcome.OK
        corrupt = isinstance(half.ops[number], Push) and outcome is Outcome.OK and self.rng.random() < self.faults
        corrupt = corrupt and self.pair.decode.scheduler.config.pairing.verify
        half.finish(number, self.pair.other(half), outcome, corrupt=corrupt)

    def fault(self, half: Half) -> None:
        rng, pair = self.rng, self.pair
        what = rng.choice(("abort", "abort", "silent", "unreachable"))
        if what == "abort" and self.prompts:
            half.abort(rng.choice(list(self.prompts)))
        elif what == "silent":
            half.lose(pair.other(half), "silent")
        elif what == "unreachable" and pair.decode.opened:
            pair.decode.hear(Unreachable(pair.decode.opened.pop(0).room, "Nobody there."))


@pytest.mark.parametrize("seed", range(24))
def test_no_page_is_lost_no_answer_is_wrong_and_everybody_gets_one(seed: int) -> None:
    History(seed).run()
