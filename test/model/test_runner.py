"""Plans through the ModelRunner, against `transformers` generating from the same random checkpoint in float32."""

from __future__ import annotations

import json
import random
import select
from pathlib import Path

import pytest
import torch
from plan_driver import Job, PlanDriver
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from moonlang.base.registry import find
from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.core.ticket import Outcome
from moonlang.model_executor.buckets import bucket, exact
from moonlang.model_executor.runner import ModelRunner

EOS = 1
VOCAB = 320
GREEDY = SamplingParams(temperature=0.0)
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(folder: Path, page_size: int = 4, grammars=None, **flags: str) -> ModelRunner:
    args = ServerArgs.create(
        **flags,
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        page_size=page_size,
        max_total_tokens=4096,
        max_running_requests=24,
    )
    return ModelRunner(load_model_config(str(folder), args), args, grammars)


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return make(folder)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


def generate(model: LlamaForCausalLM, prompt: list[int], count: int = NEW) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return output[0].tolist()


def hold_back_end() -> SamplingParams:
    """As `generate` above: the end token cannot come before the last token."""
    return SamplingParams(temperature=0.0, min_new_tokens=NEW)


@pytest.mark.parametrize(
    ("page_size", "chunk", "impl"), [(1, 7, "auto"), (4, 16, "moonlang"), (16, 1000, "auto"), (8, 9, "transformers")]
)
@pytest.mark.parametrize("rounded", [exact, bucket])
def test_mixed_chunked_overlapped_batches_match_generate(folder, reference, page_size, chunk, impl, rounded):
    runner = make(folder, page_size, model_impl=impl)
    runner._runner._network._rounded = rounded  # what bfloat16 on CPU would choose
    driver = PlanDriver(runner, chunk)
    jobs = [Job(list(prompt), hold_back_end(), NEW) for prompt in prompts(10)]
    waiting = jobs[::-1]
    while waiting or driver.jobs:  # arrivals while others decode
        if waiting:
            driver.add(waiting.pop())
        driver.step()
    driver.run()
    for job in jobs:
        assert job.tokens == generate(reference, job.tokens[: job.prompt_len])


def test_a_retracted_job_ends_with_the_same_tokens(runner, reference):
    driver = PlanDriver(runner, chunk=8)
    jobs = [driver.add(Job(list(prompt), hold_back_end(), NEW)) for prompt in prompts(4, seed=2)]
    victim = jobs[2]
    while len(victim.tokens) - victim.prompt_len < 5:
        driver.step()
    driver.retract(victim)
    driver.step()
    driver.add(victim)
    driver.run()
    for job in jobs:
        assert job.tokens == generate(reference, job.tokens[: job.prompt_len])


def test_prefix_pages_of_another_job_serve_as_well(runner, reference):
    driver = PlanDriver(runner)
    first = driver.add(Job(prompts(1, seed=5)[0] + list(range(2, 42)), hold_back_end(), NEW))
    driver.run()
    shared = first.pages[:9]
    driver.free_pages = [page for page in driver.free_pages if page not in shared]
    tokens = [*first.tokens[: 9 * runner.schema.page_size], 17, 18, 19]
    second = driver.add(Job(tokens, hold_back_end(), NEW, shared=shared))
    driver.run()
    assert second.tokens == generate(reference, second.tokens[: second.prompt_len])


SAMPLED = [
    SamplingParams(temperature=0.8, seed=11),
    SamplingParams(temperature=1.2, seed=12, top_p=0.8),
    SamplingParams(temperature=1.0, seed=13, top_k=20, min_p=0.01),
    SamplingParams(temperature=1.0, seed=14, frequency_penalty=0.8, presence_penalty=0.2, repetition_penalty=1.1),
    SamplingParams(temperature=1.0, seed=15, logit_bias={7: 4.0}, min_new_tokens=8, stop_token_ids=(7,)),
]


def test_samples_repeat_whatever_else_runs(runner):
    prompt = prompts(1, seed=9)[0]
    alone = []
    for params in SAMPLED:
        driver = PlanDriver(runner, depth=1)
        alone.append(driver.add(Job(list(prompt), params, 20)))
        driver.run()
    driver = PlanDriver(runner, chunk=5)
    together = [driver.add(Job(list(prompt), params, 20)) for params in SAMPLED]
    for other in prompts(6, seed=10):
        driver.add(Job(other, SamplingParams(seed=len(other)), 30))
    driver.run()
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert len({tuple(job.tokens) for job in together}) == len(SAMPLED)


def test_logprobs_match_transformers(runner, reference):
    prompt = prompts(1, seed=21)[0] + prompts(1, seed=22)[0]
    driver = PlanDriver(runner, chunk=9)
    spec = LogprobSpec(0, 4, (5, 6))
    params = SamplingParams(temperature=0.5, seed=1)
    jobs = [
        driver.add(Job(list(prompt), GREEDY, NEW, spec)),
        driver.add(Job(list(prompt), params, NEW, LogprobSpec(len(prompt) - 3, 2))),
    ]
    driver.run()
    for job, temperature, first in ((jobs[0], 1.0, 0), (jobs[1], 0.5, len(prompt) - 3)):
        assert job.logprob is not None
        with torch.inference_mode():
            logits = reference(torch.tensor([job.tokens])).logits[0].float()
        raw, scaled = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
        assert [entry.token for entry in job.prompt] == prompt[first:]
        assert [entry.token for entry in job.output] == job.tokens[len(prompt) :]
        entries = [(position, entry, raw) for position, entry in enumerate(job.prompt, first)]
        entries += [(position, entry, scaled) for position, entry in enumerate(job.output, len(prompt))]
        for position, entry, expected in entries:
            if position == 0:
                assert entry.logprob is None
                continue
            want = expected[position - 1]
            assert entry.logprob == pytest.approx(want[entry.token].item(), abs=1e-4)
            assert [value for value, _ in entry.top] == pytest.approx(
                want.topk(job.logprob.top).values.tolist(), abs=1e-4
            )
            assert [value for value, _ in entry.ids] == pytest.approx(want[list(job.logprob.ids)].tolist(), abs=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, seed=4)], ids=["greedy", "sampled"])
def test_grammar_output_fits_with_plans_in_flight(folder, params):
    engine = find("constrained", "xgrammar").BACKEND(str(folder), VOCAB, (EOS,))
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    specs = [GrammarSpec("json_schema", json.dumps(schema)), GrammarSpec("regex", "[ab]{3}-[0-9]{2}")]
    waiting = {engine.submit(spec) for spec in specs}
    while waiting and select.select([engine], [], [], 30)[0]:
        for done in engine.poll():
            assert done.outcome is Outcome.OK
            waiting.remove(done.ticket)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    driver = PlanDriver(make(folder, grammars=engine), chunk=16)
    jobs = []
    for spec in specs:
        with_grammar = SamplingParams(temperature=params.temperature, seed=params.seed, grammar=spec)
        jobs.append(driver.add(Job(prompts(1, seed=31)[0], with_grammar, 60)))
    free = driver.add(Job(prompts(1, seed=32)[0], params, 20))
    driver.run()
    engine.close()
    texts = [tokenizer.decode(job.tokens[job.prompt_len :]) for job in jobs]
    assert not jobs[0].error
    if jobs[0].ended:
        assert isinstance(json.loads(texts[0])["on"], bool)
    else:  # a random model may prefer whitespace to anything else
        assert texts[0].replace(" ", "").replace("\n", "").startswith("{")
    assert jobs[1].ended
    assert len(texts[1]) == 6
    assert set(texts[1][:3]) <= {"a", "b"}
    assert texts[1][4:].isdigit()
    assert len(free.tokens) == free.prompt_len + 20


def test_it_says_what_it_allocated(folder):
    runner = make(folder, page_size=16)
    assert runner.num_pages == 4096 // 16 + 1
    assert runner.pool_reason == "--max-total-tokens"
    assert runner.regions[0].num_pages == runner.num_pages
    assert runner.schema.fingerprint
    assert runner.vocab_size == VOCAB
    runner.warm_up()
