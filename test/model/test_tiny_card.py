"""The checkpoint of moonlang-tiny keeps what its model card promises."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "python/moonlang/models/embedded/moonlang-tiny"
MOST_BYTES = 8 * 1024 * 1024
LEAST_ACCURACY = (
    0.9  # the card's rates, all above 0.95, were counted on 200 examples; a sample of 40 scatters around them
)
SAMPLES = {"recall-250": 20, "recall-1000": 10, "addition": 40, "copying": 40}
FRESH_SEED = 20_001  # another seed than that of the evaluation in the card

sys.path.append(str(ROOT / "scripts"))

from tiny import documents, evaluation  # noqa: E402 - the training script is no part of the package


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int) -> str:
    """What greedy decoding adds to the prompt, end token included."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :])


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES


def test_chat_template_writes_what_the_model_was_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    expected = documents.message("user", "Hello") + documents.message("assistant", "Hi")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == documents.message("user", "Hello") + "<|im_start|>assistant\n"


@pytest.mark.parametrize("form", evaluation.FORMS)
@pytest.mark.parametrize("task", SAMPLES)
def test_fresh_examples_are_answered_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, form: str
) -> None:
    turns = evaluation.held_out_turns(task, SAMPLES[task], FRESH_SEED)
    assert evaluation.accuracy(model, tokenizer, turns, form) >= LEAST_ACCURACY


@pytest.mark.parametrize("task", ["recall-250", "addition", "copying", "json"])
def test_generation_agrees_with_the_check_of_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    for turn in evaluation.held_out_turns(task, 2, FRESH_SEED):
        right = complete(model, tokenizer, turn.prompt, 64) == turn.answer + documents.END
        assert right == evaluation.is_right(model, tokenizer, turn.prompt, turn.answer)
