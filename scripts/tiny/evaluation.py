"""Counting the right answers of a model on examples that were kept from its training."""

from collections.abc import Iterable
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.documents import END, Turn
from tiny.tasks import addition, copy_words, draw, draw_memory, fill_json

RECALL_LENGTHS = (250, 500, 1000, 2000)
FORMS = ("raw", "chat")

_QUESTION_TOKENS = 20
"""Room for the question and the chat template around a memory."""


def held_out_turns(task: str, count: int, seed: int) -> list[Turn]:
    """Examples of a task ("addition", "copying", "json" or "recall-LENGTH") that the training never sees."""
    rng = Random(f"{task} {seed}")
    if task.startswith("recall-"):
        length = int(task.removeprefix("recall-"))
        return [_recall_turn(rng, length) for _ in range(count)]
    source = {"addition": addition, "copying": copy_words, "json": fill_json}[task]
    return [draw(source, rng, held_out=True) for _ in range(count)]


def _recall_turn(rng: Random, length: int) -> Turn:
    """A question for one key of a memory that fills the length."""
    memory = draw_memory(rng, length - _QUESTION_TOKENS, held_out=True)
    return memory.turn(rng, rng.choice(list(memory.values)))


def is_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> bool:
    """Whether greedy decoding gives just the answer and then the end token.

    All tokens of the answer are checked in one forward pass: greedy decoding gives an answer
    if and only if each token of it is the most likely one after those before it.
    """
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(answer + END, add_special_tokens=False)
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer_ids) + 1).logits
    return logits[0, :-1].argmax(-1).tolist() == answer_ids


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: Iterable[Turn], form: str) -> float:
    """The share of turns answered right, as raw text or as a chat."""
    results = [
        is_right(model, tokenizer, turn.prompt, turn.answer)
        if form == "raw"
        else is_right(model, tokenizer, turn.chat_prompt(), turn.reply)
        for turn in turns
    ]
    return sum(results) / len(results)


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> dict[str, dict[str, float]]:
    """The accuracy for each task and form."""
    tasks = [f"recall-{length}" for length in RECALL_LENGTHS] + ["addition", "copying", "json"]
    figures: dict[str, dict[str, float]] = {}
    for task in tasks:
        turns = held_out_turns(task, count, seed)
        figures[task] = {form: accuracy(model, tokenizer, turns, form) for form in FORMS}
        print(f"{task:12} " + "  ".join(f"{form} {share:.1%}" for form, share in figures[task].items()), flush=True)
    return figures
