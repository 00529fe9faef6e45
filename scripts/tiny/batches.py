"""Batches of training tokens: documents drawn from the curriculum and packed into sequences."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from tiny.documents import ANSWER_WEIGHT, CONTEXT_WEIGHT, Part, chat
from tiny.tasks import SHORT_TASKS, addition, copy_words, draw, draw_memory

TOKENS_PER_STEP = 4096

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are moonlang-tiny.",
    "Answer briefly.",
    "You are a helpful AI assistant",
    "Be kind and helpful.",
)


@dataclass(frozen=True)
class Stage:
    """A span of the curriculum: how often which length of sequence is drawn, and how much of it is recall.

    The ``memory_share`` is the range for the part of a recall sequence that gives values to keys; questions fill the
    rest.
    """

    until: float
    length_shares: dict[int, float]
    recall_share: dict[int, float]
    memory_share: tuple[float, float] = (0.3, 0.95)


STAGES = (
    Stage(0.12, {128: 1.0}, {128: 0.5}, memory_share=(0.12, 0.4)),
    Stage(0.30, {128: 0.5, 256: 0.5}, {128: 0.4, 256: 0.4}),
    Stage(0.60, {256: 0.7, 512: 0.3}, {256: 0.2, 512: 0.4}),
    Stage(1.00, {256: 0.5, 512: 0.1, 1024: 0.2, 2048: 0.2}, {256: 0.15, 512: 0.3, 1024: 0.8, 2048: 0.9}),
)
"""Recall is learned on short sequences first, where it forms fast, and is then stretched to long ones."""


@dataclass(frozen=True)
class Batch:
    """Token ids, and for each token the weight of predicting it."""

    ids: torch.Tensor
    weights: torch.Tensor


class Curriculum:
    """An endless source of batches; what it draws depends on the seed and on the calls so far alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._encode_all = tokenizer.backend_tokenizer.encode_batch
        self._rng = Random(seed)

    def batch(self, progress: float) -> Batch:
        """A batch for the moment of the training when so much of it (0 to 1) is done."""
        stage = next(stage for stage in STAGES if progress < stage.until)
        lengths = list(stage.length_shares)
        length = self._rng.choices(lengths, list(stage.length_shares.values()))[0]
        rows = [self._row(length, stage) for _ in range(TOKENS_PER_STEP // length)]
        return Batch(
            ids=torch.tensor([[token for token, _ in row] for row in rows]),
            weights=torch.tensor([[weight for _, weight in row] for row in rows]),
        )

    def _row(self, length: int, stage: Stage) -> list[tuple[int, float]]:
        """One sequence: either a single recall document, or many short documents."""
        recall = self._rng.random() < stage.recall_share[length]
        memory_tokens = int(length * self._rng.uniform(*stage.memory_share))
        source = _recall_parts(self._rng, memory_tokens) if recall else _short_parts(self._rng)
        row: list[tuple[int, float]] = []
        while len(row) < length:
            parts = [next(source) for _ in range(16)]
            encodings = self._encode_all([part.text for part in parts], add_special_tokens=False)
            for part, encoding in zip(parts, encodings, strict=True):
                row += [(token, part.weight) for token in encoding.ids]
        return row[:length]


def _short_parts(rng: Random) -> Iterator[Part]:
    """Documents of the short tasks, without end."""
    tasks, shares = list(SHORT_TASKS), list(SHORT_TASKS.values())
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield from _examples_in_a_row(rng)
        elif kind < 0.5:
            yield from draw(rng.choices(tasks, shares)[0], rng).raw()
        else:
            count = rng.choice((1, 1, 1, 2, 3))
            system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.25 else None
            yield from chat([draw(task, rng) for task in rng.choices(tasks, shares, k=count)], system)


def _examples_in_a_row(rng: Random) -> Iterator[Part]:
    """Several examples of one task, a line each. The line ends are not learned: an answer ends with the end token."""
    task = addition if rng.random() < 0.8 else copy_words
    turns = [draw(task, rng) for _ in range(rng.randint(2, 8))]
    for turn in turns[:-1]:
        yield from (Part(turn.prompt, CONTEXT_WEIGHT), Part(turn.answer, ANSWER_WEIGHT), Part("\n", 0.0))
    yield from turns[-1].raw()


def _recall_parts(rng: Random, memory_tokens: int) -> Iterator[Part]:
    """A memory of about so many tokens, and then questions for its keys without end."""
    turns = draw_memory(rng, memory_tokens).turns(rng)
    if rng.random() < 0.6:
        while True:
            yield from next(turns).raw()
    while True:
        yield from chat([next(turns)])
