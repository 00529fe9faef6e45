"""Documents of weighted text, in the two forms that the model reads: raw text and chat."""

from dataclasses import dataclass
from zlib import crc32

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)

CONTEXT_WEIGHT = 0.05
"""The loss weight of text that is given to the model: it learns the format, not the dice behind it."""
ANSWER_WEIGHT = 1.0
"""The loss weight of text that the model is asked for."""
STORY_WEIGHT = 0.3
"""The loss weight of stories: they are long, and much of them is free to choose."""


@dataclass(frozen=True)
class Part:
    """A stretch of a document whose tokens all have the same loss weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Turn:
    """A question and its answer, once as raw text to be continued and once as a chat.

    The ``identity`` tells whether the turn is held out from the training (see ``is_held_out``),
    the ``weight`` is that of the answer in the loss.
    """

    prompt: str
    answer: str
    question: str
    reply: str
    identity: str
    weight: float = ANSWER_WEIGHT

    def raw(self) -> list[Part]:
        """The turn as raw text."""
        return [Part(self.prompt, CONTEXT_WEIGHT), Part(self.answer + END, self.weight)]

    def chat_prompt(self) -> str:
        """What to give to the model for a reply in a chat."""
        return message("user", self.question) + f"{START}assistant\n"


def is_held_out(identity: str) -> bool:
    """Whether an example is kept for the evaluation: about one in ten is, by its checksum.

    Examples without an identity are facts that can only be learned by heart; none of them is held out.
    """
    return identity != "" and crc32(identity.encode()) % 10 == 0


def message(role: str, content: str) -> str:
    """One message of a chat, just as the chat template writes it."""
    return f"{START}{role}\n{content}{END}\n"


def chat(turns: list[Turn], system: str | None = None) -> list[Part]:
    """A chat of several turns."""
    parts = [Part(message("system", system), CONTEXT_WEIGHT)] if system else []
    for turn in turns:
        parts.append(Part(turn.chat_prompt(), CONTEXT_WEIGHT))
        parts.append(Part(turn.reply + END, turn.weight))
        parts.append(Part("\n", CONTEXT_WEIGHT))
    return parts
