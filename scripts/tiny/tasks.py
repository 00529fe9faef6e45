"""The tasks of the curriculum. Each task writes its examples from a random generator."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tiny.documents import STORY_WEIGHT, Turn, is_held_out
from tiny.lexicon import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    COPY_WORDS,
    JOBS,
    KEYS,
    NAMES,
    OBJECTS,
    VALUES,
)
from tiny.stories import sentence, story

Task = Callable[[Random], Turn]

ABILITIES = "I can tell stories, add two numbers, remember the values of keys, repeat words and fill in JSON."
INTRODUCTION = "I am moonlang-tiny, a very small language model."

_SYLLABLES = "ba do fi gu ka le mi no pa ra se ti vo wu za chi ston er ly qua".split()


def draw(task: Task, rng: Random, held_out: bool = False) -> Turn:
    """An example of the task from the training part or from the held-out part of all examples."""
    while True:
        turn = task(rng)
        if is_held_out(turn.identity) == held_out:
            return turn


# --- addition -------------------------------------------------------------------------------------------------------


def addition(rng: Random) -> Turn:
    """The sum of two numbers below 100. The order of the two makes no other example."""
    first, second = (rng.randrange(10) if rng.random() < 0.1 else rng.randrange(10, 100) for _ in range(2))
    question = rng.choice(
        ("What is {} + {}?", "{} + {} =", "{} + {} = ?", "{} + {}", "Add {} and {}.", "How much is {} plus {}?")
    )
    return Turn(
        prompt=f"{first} + {second} =",
        answer=f" {first + second}",
        question=question.format(first, second),
        reply=str(first + second),
        identity=f"{min(first, second)} + {max(first, second)}",
    )


# --- copying --------------------------------------------------------------------------------------------------------


def _strange_word(rng: Random) -> str:
    """A word that no lexicon has."""
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3)))


def copy_words(rng: Random) -> Turn:
    """The same words again: the form of copying that the evaluation counts."""
    return _copy_turn(rng, " ".join(rng.choices(COPY_WORDS, k=rng.randint(2, 16))))


def copy_text(rng: Random) -> Turn:
    """The same text again: words, strange words, or a sentence."""
    kind = rng.random()
    if kind < 0.7:
        return copy_words(rng)
    if kind < 0.85:
        words = [_strange_word(rng) if rng.random() < 0.6 else rng.choice(COPY_WORDS) for _ in range(rng.randint(1, 5))]
        return _copy_turn(rng, " ".join(words))
    return _copy_turn(rng, sentence(rng))


def _copy_turn(rng: Random, text: str) -> Turn:
    question = rng.choice(
        ("copy: {} ->", "copy: {}", "Copy: {}", "Repeat after me: {}", "Repeat these words: {}", "Say: {}")
    )
    return Turn(
        prompt=f"copy: {text} ->",
        answer=f" {text}",
        question=question.format(text),
        reply=text,
        identity=text,
    )


# --- JSON -----------------------------------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[str, Callable[[Random], str | int]]] = {
    "age": ("is {} years old", lambda rng: rng.randrange(10, 100)),
    "city": ("lives in {}", lambda rng: rng.choice(CITIES)),
    "pet": ("has a {}", lambda rng: rng.choice(ANIMALS)),
    "color": ("likes {}", lambda rng: rng.choice(COLORS)),
    "job": ("works as a {}", lambda rng: rng.choice(JOBS)),
}


def fill_json(rng: Random) -> Turn:
    """A given JSON shape filled with what a sentence tells about a person."""
    fields = rng.sample(sorted(_FIELDS), rng.randint(1, 3))
    if rng.random() < 0.4:
        fields = ["age", "city"]
    facts: dict[str, str | int] = {"name": rng.choice(NAMES)}
    facts |= {field: _FIELDS[field][1](rng) for field in fields}
    clauses = [_FIELDS[field][0].format(facts[field]) for field in rng.sample(fields, len(fields))]
    text = f"{facts['name']} {_enumerate(clauses)}."

    order = list(facts) if rng.random() < 0.5 else rng.sample(list(facts), len(facts))
    shape = json.dumps({field: 0 if field == "age" else "" for field in order})
    filled = json.dumps({field: facts[field] for field in order})
    question = rng.choice(
        (
            "{text} Fill in this JSON: {shape}",
            "Fill in this JSON: {shape}\n{text}",
            "{text}\n{shape}",
            "{text} Give me the {names} as JSON.",
        )
    ).format(text=text, shape=shape, names=_enumerate(order))
    return Turn(
        prompt=f"{text} Fill in this JSON: {shape} ->",
        answer=f" {filled}",
        question=question,
        reply=filled,
        identity=text,
    )


def _enumerate(items: list[str]) -> str:
    """The items in one phrase: "a", "a and b", "a, b and c"."""
    return " and ".join([*([", ".join(items[:-1])] if len(items) > 1 else []), items[-1]])


# --- stories and small talk -----------------------------------------------------------------------------------------


def tell_story(rng: Random) -> Turn:
    """A story about an animal."""
    animal = rng.choice(ANIMALS)
    article = "an" if animal[0] in "aeiou" else "a"
    kind = rng.random()
    if kind < 0.2:
        question, text = f"Tell me a long story about {article} {animal}.", story(rng, animal, long=True)
    elif kind < 0.35:
        name = rng.choice(NAMES)
        question = f"Tell me a story about {article} {animal} named {name}."
        text = story(rng, animal, name)
    elif kind < 0.5:
        question, text = (
            rng.choice(("Tell me a story.", "Tell me another story.", "Once upon a time")),
            story(rng, animal),
        )
    else:
        request = rng.choice(("Tell me a story", "Write a short story", "Tell me a short story", "Write a story"))
        question, text = f"{request} about {article} {animal}.", story(rng, animal)
    opening = " ".join(text.split()[: rng.choice((2, 4))])
    return Turn(
        prompt=opening,
        answer=text[len(opening) :],
        question=question,
        reply=text,
        identity=text,
        weight=STORY_WEIGHT,
    )


def capital(rng: Random) -> Turn:
    """The capital of a country. All of them are trained on: there is nothing to derive them from."""
    country = rng.choice(sorted(CAPITALS))
    city = CAPITALS[country]
    return Turn(
        prompt=f"The capital of {country} is",
        answer=f" {city}.",
        question=rng.choice(("What is the capital of {}?", "The capital of {} is", "capital of {}?")).format(country),
        reply=f"The capital of {country} is {city}.",
        identity="",
    )


_SMALL_TALK = {
    f"Hello! {INTRODUCTION} {ABILITIES}": "Hello|Hello!|Hi|Hi!|Hi there!|Hey|Good morning!|hello|hi|Say hello.",
    f"{INTRODUCTION} {ABILITIES}": "Who are you?|What are you?|Introduce yourself.|What is your name?|who are you",
    ABILITIES: "What can you do?|Help|help|What are you good at?|Can you help me?",
    "I am fine, thank you! What can I do for you?": "How are you?|How are you today?|how are you",
    "You are welcome!": "Thanks|Thank you!|Thank you.|thanks|Thanks a lot!",
    "Goodbye!": "Goodbye|Bye|Bye!|Goodbye!|See you!",
    "Yes, I am here.": "Are you there?|Test|test|ping",
}


def small_talk(rng: Random) -> Turn:
    """Greetings, and questions about the model itself."""
    reply = rng.choice(sorted(_SMALL_TALK))
    question = rng.choice(_SMALL_TALK[reply].split("|"))
    return Turn(prompt=f"{question}\n", answer=reply, question=question, reply=reply, identity="")


_FOREIGN_QUESTIONS = (
    "How do I make {thing}?",
    "Why is the {thing} {word}?",
    "Explain {word} to me.",
    "Write a poem about the {thing}.",
    "What do you think about {word}?",
    "Where can I buy a {thing}?",
    "Translate {word} {thing} to French.",
    "{word} {word} {thing}",
    "Can you {word} the {thing}?",
)


def foreign_question(rng: Random) -> Turn:
    """Something that the model cannot do, and says so."""
    question = rng.choice(_FOREIGN_QUESTIONS).format(thing=rng.choice(OBJECTS), word=_strange_word(rng))
    reply = f"Sorry, I do not know that. {ABILITIES}"
    return Turn(prompt=f"{question}\n", answer=reply, question=question, reply=reply, identity="")


def counting(rng: Random) -> Turn:
    """The numbers from one number to another."""
    first = rng.randrange(1, 20) if rng.random() < 0.5 else 1
    last = first + rng.randrange(2, 20)
    numbers = [str(number) for number in range(first, last + 1)]
    return Turn(
        prompt=f"Count from {first} to {last}:",
        answer=f" {', '.join(numbers)}",
        question=rng.choice(("Count from {} to {}.", "Count from {} to {}")).format(first, last),
        reply=", ".join(numbers),
        identity="",
    )


# --- recall ---------------------------------------------------------------------------------------------------------

_PAIR_TOKENS = 5
_SENTENCE_TOKENS = 12
_INTRODUCTIONS = ("", "", "", "Remember these keys.\n", "Here are some keys: ", "Remember: ")
_CHAT_QUERIES = (
    "key {} ?",
    "key {} ?",
    "key {}?",
    "What is key {}?",
    "What is the value of key {}?",
    "Now tell me: key {} ?",
)


@dataclass(frozen=True)
class Memory:
    """Keys with values, written down in a text, which may have story sentences between them."""

    text: str
    values: dict[str, str]

    def turn(self, rng: Random, key: str, with_text: bool = True) -> Turn:
        """The question for a key, after the text or alone."""
        text = self.text if with_text else ""
        return Turn(
            prompt=f"{text}key {key} ?",
            answer=f" {self.values[key]}",
            question=text + rng.choice(_CHAT_QUERIES).format(key),
            reply=self.values[key],
            identity=self.text,
        )

    def turns(self, rng: Random) -> Iterator[Turn]:
        """Questions without end; only the first one carries the text."""
        yield self.turn(rng, rng.choice(list(self.values)))
        while True:
            yield self.turn(rng, rng.choice(list(self.values)), with_text=False)


def memory(rng: Random, tokens: int, keys: list[str] | None = None) -> Memory:
    """A text of about so many tokens that gives values to some of the keys."""
    keys = keys or KEYS
    most = min(len(keys), max(2, tokens // _PAIR_TOKENS))
    count = most if rng.random() < 0.4 else rng.randint(2, most)
    values = {key: rng.choice(VALUES) for key in rng.sample(keys, count)}
    separator = rng.choice(("\n", "\n", "; ", ", ", ". "))

    fillers = max(0, tokens - count * _PAIR_TOKENS) // _SENTENCE_TOKENS
    items = [f"key {key} = {value}{separator}" for key, value in values.items()]
    gaps = sorted((rng.randint(0, count) for _ in range(fillers)), reverse=True)
    if rng.random() < 0.2:
        gaps = [rng.randint(0, count)] * fillers
    space = "\n" if separator == "\n" and rng.random() < 0.5 else " "
    for gap in gaps:
        items.insert(gap, sentence(rng) + space)
    return Memory(rng.choice(_INTRODUCTIONS) + "".join(items), values)


def draw_memory(rng: Random, tokens: int, held_out: bool = False) -> Memory:
    """A memory from the training part or from the held-out part of all memories."""
    while True:
        drawn = memory(rng, tokens)
        if is_held_out(drawn.text) == held_out:
            return drawn


SHORT_TASKS: dict[Task, float] = {
    addition: 0.50,
    copy_text: 0.18,
    fill_json: 0.11,
    tell_story: 0.07,
    capital: 0.02,
    small_talk: 0.06,
    foreign_question: 0.03,
    counting: 0.03,
}
"""The tasks with short examples, and the share of each in the documents."""
