"""The tokenizer: byte-level BPE whose pieces are chosen so that the tasks are easy to learn.

A key ("7f" after "key") is one token, a word is at most one piece before BPE, and every digit is a token of its own.
"""

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny.documents import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS
from tiny.lexicon import CITIES, COPY_WORDS, KEYS, NAMES
from tiny.tasks import SHORT_TASKS, draw

MAX_POSITIONS = 4096

_PIECES = "|".join(
    (
        r"(?<=[Kk]ey) [0-9a-f]{2}(?![0-9a-z])",  # a key of the recall task
        r" ?\p{L}+",  # a word
        r"\p{N}",  # a digit
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\s",
    )
)
_WORD_REPEATS = 200
_SAMPLES_PER_TASK = 600
_MIN_FREQUENCY = 60


def build_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the words of the lexicon and on examples of the tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _corpus(seed: int) -> Iterator[str]:
    """The text that the pieces are counted in."""
    keys = "".join(f"key {key}\n" for key in KEYS)
    words = "".join(f"{word} {word}\n" for word in [*COPY_WORDS, *NAMES, *CITIES])
    for _ in range(_WORD_REPEATS):
        yield keys
        yield words
    rng = Random(seed)
    for task in SHORT_TASKS:
        for _ in range(_SAMPLES_PER_TASK):
            turn = draw(task, rng)
            yield f"{turn.question}\n{turn.reply}\n{turn.prompt}{turn.answer}\nsystem\nuser\nassistant\n"
