"""PlanRunner over a toy network whose next token depends on every token read back through the page table."""

import random

import numpy as np
import pytest
import torch

from moonlang.base.errors import BugError, PeerError
from moonlang.core.plan import Row, SlotStart, StepPlan
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.model_executor.buckets import bucket, exact
from moonlang.model_executor.layout import padded, to_torch
from moonlang.model_executor.plan_runner import PlanRunner
from moonlang.model_executor.sampling import NOT_FINITE, NOTHING_ALLOWED
from moonlang.model_executor.slots import SlotTable

VOCAB, PAGE, PAGES, SLOTS = 97, 4, 64, 8
GREEDY = SamplingParams(temperature=0.0)
POISON = 96  # a token that turns the logits of its sequence into NaN


def chain(tokens):
    """The oracle: a hash of the tokens, and the best next token after them."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 9973
    return value


def successor(tokens):
    return chain(tokens) % 90


class ToyNetwork:
    """A cell holds the token stored in it; hidden states are the hash of all cells up to a position."""

    def __init__(self, rounded=exact):
        self.cells = np.full((PAGES, PAGE), -1)
        self.rounded = rounded

    def forward(self, batch, kept, progress):
        input_ids, layout = to_torch(padded(batch, self.rounded(len(batch.ids))), torch.device("cpu"))
        self.cells[layout.store_page.numpy(), layout.store_offset.numpy()] = input_ids.numpy()
        hidden = []
        table = layout.page_table.numpy()
        for row, (start, length) in enumerate(zip(layout.row_starts, layout.row_lengths, strict=True)):
            assert row >= layout.num_decode or length == 1
            for end in range(start + 1, start + length + 1):
                tokens = self.cells[table[row]].reshape(-1)[:end]
                assert (tokens >= 0).all()
                hidden.append(np.nan if POISON in tokens else chain(tokens.tolist()))
        return ToyHidden(torch.tensor(hidden, dtype=torch.float64)[torch.from_numpy(kept)][:, None])


class ToyHidden:
    def __init__(self, states):
        self.states = states

    def logits(self, begin, end):
        hidden = self.states[begin:end]
        seeds = hidden[:, 0].nan_to_num(0).long()
        logits = torch.stack([torch.arange(VOCAB).add(seed).mul(13).remainder(31).float() / 31 for seed in seeds])
        logits[:, POISON] = -100.0
        logits[torch.arange(len(seeds)), seeds % 90] = 5.0
        logits[hidden[:, 0].isnan()] = float("nan")
        return logits

    def best(self, begin, end):
        peaks, tokens = self.logits(begin, end).max(dim=-1)
        return tokens.tolist(), (~peaks.isfinite()).nonzero()[:, 0].tolist()


class Words:
    """A grammar that allows exactly the tokens of its source, then the end token 0, in order."""

    def __init__(self, spec):
        self.left = [int(word) for word in spec.source.split()]
        self.optional_end = spec.kind == "ebnf"
        self.done = False

    def accept(self, token):
        if not self.left or token != self.left[0]:
            self.done = self.done or (token == 0 and not self.left)
            return self.done
        self.left.pop(0)
        return True

    def fill_bitmask(self, bitmask, row):
        bits = np.zeros(bitmask.shape[1] * 32, np.uint8)
        bits[self.left[:1] or [0]] = 1
        bitmask[row] = np.packbits(bits, bitorder="little").view(np.int32)

    @property
    def ended(self):
        return self.done or not self.left


class Grammars:
    def matcher(self, spec):
        return Words(spec)


def make(grammars=None, rounded=exact, slots=SLOTS):
    table = SlotTable(slots, PAGES, VOCAB, (0,), grammars)
    return PlanRunner(ToyNetwork(rounded), table, page_size=PAGE, vocab_size=VOCAB)


def start(slot, tokens, prompt_len=None, params=GREEDY, logprob=None, epoch=1):
    return SlotStart(slot, epoch, prompt_len or len(tokens), tuple(tokens), params, logprob)


def pages_for(slot, count):
    return tuple(range(slot * 8, slot * 8 + count))


def prefill(slot, tokens, begin=0, end=None, sample=None, epoch=1):
    """A row over tokens [begin, end), bringing its pages with its first part."""
    end = len(tokens) if end is None else end
    pages = pages_for(slot, 8) if begin == 0 else ()
    sample = end == len(tokens) if sample is None else sample
    return Row(slot, epoch, begin, end - begin, tuple(tokens[begin:end]), sample, 0, pages)


def decode(slot, position, epoch=1):
    return Row(slot, epoch, position, 1, (), True)


def test_mixed_chunked_rows_follow_the_oracle():
    runner = make()
    first, second, third = [3, 1, 4, 1, 5, 9, 2], [2, 7], [8, 8, 8, 8, 8]
    one = runner.run(StepPlan(0, 0, (start(2, first), start(5, second)), (prefill(2, first, 0, 3), prefill(5, second))))
    assert [row.tokens for row in one.rows] == [(), (successor(second),)]
    assert [(row.slot, row.epoch) for row in one.rows] == [(2, 1), (5, 1)]
    rows = (decode(5, 2), prefill(2, first, 3), prefill(0, third))
    two = runner.run(StepPlan(1, 0, (start(0, third),), rows))
    second.append(successor(second))
    assert [row.tokens for row in two.rows] == [(successor(second),), (successor(first),), (successor(third),)]
    # A decode row needs no tokens in the plan: the runner knows what it sampled.
    second.append(successor(second))
    first.append(successor(first))
    three = runner.run(StepPlan(2, 0, (), (decode(2, 7), decode(5, 4 - 1))))
    assert [row.tokens for row in three.rows] == [(successor(first),), (successor(second),)]


@pytest.mark.parametrize("rounded", [exact, bucket, lambda tokens: tokens + 37], ids=["exact", "bucket", "plus 37"])
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_follow_the_oracle(rounded, seed):
    """Decode rows, then chunks, some without a sample; padding tokens change nothing."""
    rng = random.Random(seed)
    slots = 12
    runner = make(rounded=rounded, slots=slots)
    table = list(range(1, PAGES))
    rng.shuffle(table)
    tokens = {slot: [rng.randrange(90) for _ in range(rng.randrange(1, 16))] for slot in range(slots)}
    pages = {slot: tuple(table[slot * 5 : slot * 5 + 5]) for slot in tokens}
    done = dict.fromkeys(tokens, 0)
    plan_id = 0
    while any(done[slot] < 20 for slot in tokens):
        chosen = [slot for slot in rng.sample(range(slots), slots) if done[slot] < 20 and rng.random() < 0.7]
        rows = []
        for slot in chosen:
            known, begin = len(tokens[slot]), done[slot]
            decoding = begin == known - 1 and begin > 0 and rng.random() < 0.8
            end = begin + 1 if decoding else rng.randrange(begin + 1, known + 1)
            given = () if decoding else tuple(tokens[slot][begin:end])
            rows.append(Row(slot, 1, begin, end - begin, given, end == known, 0, pages[slot] if begin == 0 else ()))
        rows.sort(key=lambda row: bool(row.tokens))
        starts = tuple(start(row.slot, tokens[row.slot]) for row in rows if row.start == 0)
        for row, result in zip(rows, runner.run(StepPlan(plan_id, 0, starts, tuple(rows))).rows, strict=True):
            done[row.slot] = row.start + row.length
            assert result.slot == row.slot
            assert result.tokens == ((successor(tokens[row.slot]),) if row.sample else ())
            tokens[row.slot] += result.tokens
        plan_id += 1


def test_buckets_waste_little_and_are_few():
    assert [bucket(n) for n in (0, 1, 16, 17, 64, 65, 257, 2000)] == [0, 1, 16, 24, 64, 80, 320, 2048]
    assert all(n <= bucket(n) <= n + max(7, n / 4) for n in range(4096))
    assert all(bucket(bucket(n)) == bucket(n) for n in range(4096))
    assert len({bucket(n) for n in range(1, 2049)}) < 60


def test_a_plan_without_rows_only_starts():
    runner = make()
    assert runner.run(StepPlan(4, 0, (start(1, [5]),), ())).rows == ()
    assert runner.run(StepPlan(5, 0, (), (prefill(1, [5]),))).rows[0].tokens == (successor([5]),)


def test_shared_prefix_pages_are_read_not_written():
    runner = make()
    tokens = [1, 2, 3, 4, 5, 6]
    runner.run(StepPlan(0, 0, (start(0, tokens),), (prefill(0, tokens),)))
    other = [1, 2, 3, 4, 9]
    row = Row(1, 1, 4, 1, (9,), True, 0, (pages_for(0, 1)[0], 40))
    assert runner.run(StepPlan(1, 0, (start(1, other),), (row,))).rows[0].tokens == (successor(other),)


def test_a_slot_forgets_its_former_tenant():
    """Even when the former tenant had everything and did nothing, and a neighbour keeps all paths busy."""
    runner = make(Grammars())
    spec = LogprobSpec(0, 2)
    params = SamplingParams(temperature=0.0, logit_bias={11: 100.0}, grammar=GrammarSpec("regex", "30 40"))
    runner.run(StepPlan(0, 0, (start(3, [1, 2, 3, 4, 5], params=params, logprob=spec),), ()))
    runner.run(StepPlan(1, 0, (), (prefill(3, [1, 2, 3, 4, 5], 0, 2),)))
    starts = (start(3, [4], epoch=2), start(4, [4], params=params, logprob=spec))
    row = Row(3, 2, 0, 1, (4,), True, 0, (24,))
    result, neighbour = runner.run(StepPlan(2, 0, starts, (row, prefill(4, [4])))).rows
    assert (result.tokens, result.epoch, result.output, result.prompt) == ((successor([4]),), 2, (), ())
    assert neighbour.tokens == (30,)
    assert runner._table.page_table[3].tolist() == [24] + [0] * (PAGES - 1)
    assert not runner._table.errors


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.9, seed=5),
        SamplingParams(temperature=1.3, seed=8, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingParams(temperature=2.0, seed=9, top_k=9, min_p=0.01, min_new_tokens=12, logit_bias={0: 9.0}),
    ],
    ids=["greedy", "sampled", "penalised", "filtered"],
)
def test_a_retracted_request_goes_on_with_the_same_tokens(params):
    def continuation(runner, tokens, prompt_len, count):
        tokens = list(tokens)
        plan = StepPlan(0, 0, (start(6, tokens, prompt_len, params),), (prefill(6, tokens),))
        for _ in range(count):
            tokens += runner.run(plan).rows[0].tokens
            plan = StepPlan(0, 0, (), (decode(6, len(tokens) - 1),))
        return tokens

    whole = continuation(make(), [5, 6, 7], 3, 20)
    assert continuation(make(), whole[:11], 3, 12) == whole
    if params.min_new_tokens:
        assert 0 not in whole[3:15]
        assert 0 in whole[15:]


def test_a_sampled_row_is_the_same_alone_and_in_company():
    params = SamplingParams(temperature=1.5, seed=77, top_p=0.95)

    def run(companions):
        runner = make()
        tokens = [9, 9]
        starts = [start(slot, [slot], params=companions[slot]) for slot in companions]
        rows = [prefill(slot, [slot]) for slot in companions]
        plan = StepPlan(0, 0, (*starts, start(7, tokens, params=params)), (*rows, prefill(7, tokens)))
        for step in range(12):
            tokens += runner.run(plan).rows[-1].tokens
            others = [decode(slot, step + 1) for slot in companions]
            plan = StepPlan(0, 0, (), (*others, decode(7, len(tokens) - 1)))
        return tokens

    alone = run({})
    company = {0: GREEDY, 1: SamplingParams(seed=1), 2: SamplingParams(seed=77, temperature=0.7, presence_penalty=1.0)}
    assert run(company) == alone


def test_a_row_of_another_tenant_is_a_bug():
    runner = make()
    runner.run(StepPlan(0, 0, (start(2, [1], epoch=4),), (prefill(2, [1], epoch=4),)))
    with pytest.raises(BugError, match="Slot 2 is at epoch 4, its row at 3"):
        runner.run(StepPlan(1, 0, (), (decode(2, 1, epoch=3),)))


def test_one_row_of_nan_fails_alone():
    runner = make()
    bad, good = [1, POISON], [1, 2]
    for params in (GREEDY, SamplingParams(temperature=1.0)):
        starts = (start(0, bad, params=params), start(1, good))
        rows = runner.run(StepPlan(0, 0, starts, (prefill(0, bad), prefill(1, good)))).rows
        assert rows[0].error == NOT_FINITE
        assert rows[0].tokens == ()
        assert (rows[1].error, rows[1].tokens) == ("", (successor(good),))


def test_logprobs_of_output_and_prompt():
    runner = make()
    tokens = [4, 2, 4, 2, 4, 2, 1]

    def expected(prefix):
        return ToyHidden(torch.tensor([[float(chain(prefix))]])).logits(0, 1)[0].log_softmax(-1)

    spec = LogprobSpec(2, 3, (8, 5))
    params = SamplingParams(temperature=0.5, seed=3)
    one = runner.run(StepPlan(0, 0, (start(0, tokens, 7, params, spec),), (prefill(0, tokens, 0, 4),))).rows[0]
    two = runner.run(StepPlan(1, 0, (), (prefill(0, tokens, 4),))).rows[0]
    assert (len(one.prompt), one.output) == (3, ())  # positions 2, 3 and 4: the last is known from position 3
    entries = [*one.prompt, *two.prompt]
    assert [entry.token for entry in entries] == tokens[2:]
    for position, entry in enumerate(entries, 2):
        want = expected(tokens[:position])
        assert entry.logprob == pytest.approx(want[entry.token].item(), abs=1e-5)
        assert [token for _, token in entry.top] == sorted(range(VOCAB), key=lambda token: (-want[token], token))[:3]
        assert [value for value, _ in entry.top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-5)
        assert [token for _, token in entry.ids] == [8, 5]
        assert [value for value, _ in entry.ids] == pytest.approx(want[[8, 5]].tolist(), abs=1e-5)
    scaled = ToyHidden(torch.tensor([[float(chain(tokens))]])).logits(0, 1)[0].div(0.5).log_softmax(-1)
    assert two.output[0].token == two.tokens[0]
    assert two.output[0].logprob == pytest.approx(scaled[two.tokens[0]].item(), abs=1e-5)


def test_the_first_prompt_position_has_no_logprob():
    runner = make()
    row = runner.run(
        StepPlan(0, 0, (start(0, [4, 5], logprob=LogprobSpec(0)),), (prefill(0, [4, 5], sample=True),))
    ).rows[0]
    assert [(entry.token, entry.logprob is None) for entry in row.prompt] == [(4, True), (5, False)]
    after = runner.run(StepPlan(1, 0, (), (decode(0, 2),))).rows[0]
    assert after.prompt == ()
    assert len(after.output) == 1


def test_prompt_logprobs_do_not_slow_down_the_steps_after_them():
    runner = make()
    tokens = [4, 5, 6]
    plan = StepPlan(0, 0, (start(0, tokens, logprob=LogprobSpec(0)), start(1, tokens, logprob=LogprobSpec(3))), ())
    runner.run(plan)
    assert runner._table.next_prompt == {0: 0}
    runner.run(StepPlan(1, 0, (), (prefill(0, tokens), prefill(1, tokens))))
    assert runner._table.next_prompt == {}


def test_prompt_positions_known_only_to_the_cache_have_no_logprob():
    runner = make()
    tokens = [1, 2, 3, 4, 5, 6]
    runner.run(StepPlan(0, 0, (start(0, tokens),), (prefill(0, tokens),)))
    row = Row(1, 1, 4, 2, (5, 6), True, 0, (0, 40))
    result = runner.run(StepPlan(1, 0, (start(1, tokens, logprob=LogprobSpec(4)),), (row,))).rows[0]
    assert [(entry.token, entry.logprob is None) for entry in result.prompt] == [(5, True), (6, False)]


def words(source):
    return SamplingParams(temperature=0.0, grammar=GrammarSpec("regex", source))


def test_a_grammar_is_followed_between_plans_and_says_when_it_ends():
    runner = make(Grammars())
    plan = StepPlan(0, 0, (start(0, [1], params=words("30 40 50")), start(1, [1])), (prefill(0, [1]), prefill(1, [1])))
    seen = []
    for step in range(3):
        constrained, free = runner.run(plan).rows
        seen += constrained.tokens
        assert constrained.ended is (step == 2)
        assert free.ended is False
        plan = StepPlan(0, 0, (), (decode(0, step + 1), decode(1, step + 1)))
    assert seen == [30, 40, 50]
    # A row planned before the end was known does no harm.
    assert not runner.run(plan).rows[0].error


def test_a_restarted_grammar_stands_where_it_stood():
    runner = make(Grammars())
    tokens = [1, 30, 40]
    result = runner.run(StepPlan(0, 0, (start(0, tokens, 1, words("30 40 50")),), (prefill(0, tokens),))).rows[0]
    assert (result.tokens, result.ended) == ((50,), True)


def test_grammar_errors_concern_their_row_only():
    for grammars, tokens, words_of in (
        (Grammars(), [1, 31], "does not allow token 31"),
        (None, [1], "Grammars are off"),
    ):
        runner = make(grammars)
        starts = (start(0, tokens, 1, words("30 40")), start(1, [2]))
        rows = runner.run(StepPlan(0, 0, starts, (prefill(0, tokens), prefill(1, [2])))).rows
        assert words_of in rows[0].error
        assert rows[1].tokens == (successor([2]),)


def test_constraints_that_exclude_everything_are_an_error():
    runner = make(Grammars())
    params = SamplingParams(grammar=GrammarSpec("regex", "30 40"), logit_bias={30: -float("inf")})
    row = runner.run(StepPlan(0, 0, (start(0, [1], params=params),), (prefill(0, [1]),))).rows[0]
    assert row.error == NOTHING_ALLOWED


class LosingNetwork(ToyNetwork):
    """Loses a rank at the end of every other forward, when the pages of that plan are written."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, batch, kept, progress):
        hidden = super().forward(batch, kept, progress)
        self.calls += 1
        if self.calls % 2:
            raise PeerError("Rank 3 has ended.")
        return hidden


def every_need():
    """Plans in which slots have all kinds of state: draws, penalties, a grammar, log probabilities."""
    tokens = [[3, 1, 4], [2, 7], [8, 8, 8, 8], [5, 5]]
    params = (
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(temperature=0.7, seed=5, frequency_penalty=1.5, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, grammar=GrammarSpec("regex", "7 8 9 10 11")),
        GREEDY,
    )
    spec = LogprobSpec(0, 2)
    starts = tuple(start(slot, tokens[slot], params=params[slot], logprob=spec) for slot in (0, 1, 2))
    yield StepPlan(0, 0, starts, (prefill(0, tokens[0]), prefill(1, tokens[1]), prefill(2, tokens[2], 0, 2)))
    second = (decode(0, 3), decode(1, 2), prefill(2, tokens[2], 2), prefill(3, tokens[3]))
    yield StepPlan(1, 0, (start(3, tokens[3], params=params[3]),), second)
    yield StepPlan(2, 0, (), (decode(0, 4), decode(1, 3), decode(2, 4), decode(3, 2)))
    yield StepPlan(
        3, 0, (start(0, [9], epoch=2),), (decode(1, 4), decode(2, 5), decode(3, 3), prefill(0, [9], epoch=2))
    )
    yield StepPlan(4, 0, (), (decode(0, 1, epoch=2), decode(1, 5), decode(2, 6)))


def test_a_plan_that_failed_in_its_forward_is_run_again_as_if_for_the_first_time():
    whole, losing = make(Grammars()), make(Grammars())
    losing.connect(LosingNetwork(), in_rounds=False)
    for plan in every_need():
        expected = whole.run(plan)
        with pytest.raises(PeerError):
            losing.run(plan)
        found = losing.run(plan)
        assert found.rows == expected.rows
        assert not any(row.error for row in found.rows)
