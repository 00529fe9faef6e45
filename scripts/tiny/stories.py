"""A small grammar of stories in plain English."""

from random import Random

from tiny.lexicon import ADJECTIVES, ANIMALS, FEELINGS, NAMES, OBJECTS, PLACES, QUALITIES

_SENTENCES = (
    "The {adjective} {animal} ran to the {place}.",
    "{name} walked slowly across the {place}.",
    "A {quality} {object} was lying near the {place}.",
    "{name} gave the {object} to the {animal}.",
    "The {animal} looked at the {quality} {object}.",
    "It was a warm day at the {place}.",
    "{name} and the {adjective} {animal} went home together.",
    "Nobody knew where the {object} came from.",
    "The {animal} was very {adjective}.",
    "{name} liked to sit by the {place} and listen to the birds.",
)
_OPENINGS = (
    "Once upon a time there was {a_adjective} {animal} named {name}.",
    "Long ago, {a_adjective} {animal} named {name} lived by the {place}.",
    "There was once {a_adjective} {animal}. The name of the {animal} was {name}.",
)
_HOMES = (
    "{name} lived in a little house near the {place}.",
    "Every morning {name} went for a walk to the {place}.",
    "{name} loved the {place} more than anything.",
)
_FINDS = (
    "One day {name} found {a_quality} {object} under a tree.",
    "One morning {name} saw {a_quality} {object} on the way to the {other_place}.",
    "One evening the wind carried {a_quality} {object} to the door.",
)
_MEETINGS = (
    '"Whose {object} is this?" asked {name}. "It is mine," said {friend}, {a_friend_adjective} {friend_animal}.',
    "{name} showed the {object} to {friend}, {a_friend_adjective} {friend_animal} from the {other_place}.",
    '"Look what I found!" said {name}. {friend} the {friend_animal} came to see the {object}.',
)
_ADVENTURES = (
    "Together they carried the {object} all the way to the {other_place}.",
    "They played with the {object} until the sun went down.",
    "They followed an old path and came to the {other_place}.",
    "It began to rain, so they waited in the barn and told each other stories.",
    "They shared some bread and honey and talked about the stars.",
    "Then they crossed the bridge and looked for the {other_animal} who had lost it.",
)
_ENDINGS = (
    "{name} went home and was very {feeling}.",
    "From that day on, {name} and {friend} were best friends.",
    "That night {name} slept well and dreamed of the {object}.",
)


def _with_article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentence(rng: Random) -> str:
    """One sentence that stands for itself, as filler between other things."""
    return rng.choice(_SENTENCES).format(
        adjective=rng.choice(ADJECTIVES),
        quality=rng.choice(QUALITIES),
        animal=rng.choice(ANIMALS),
        object=rng.choice(OBJECTS),
        place=rng.choice(PLACES),
        name=rng.choice(NAMES),
    )


def story(rng: Random, animal: str, name: str | None = None, long: bool = False) -> str:
    """A story about the animal; a long one has more adventures."""
    names = rng.sample([other for other in NAMES if other != name], 2)
    friend_animal, other_animal = rng.sample([other for other in ANIMALS if other != animal], 2)
    place, other_place = rng.sample(PLACES, 2)
    words = {
        "name": name or names[0],
        "friend": names[1],
        "animal": animal,
        "friend_animal": friend_animal,
        "other_animal": other_animal,
        "place": place,
        "other_place": other_place,
        "object": rng.choice(OBJECTS),
        "feeling": rng.choice(FEELINGS),
        "a_adjective": _with_article(rng.choice(ADJECTIVES)),
        "a_friend_adjective": _with_article(rng.choice(ADJECTIVES)),
        "a_quality": _with_article(rng.choice(QUALITIES)),
    }
    chosen = sorted(rng.sample(range(len(_ADVENTURES)), 5 if long else rng.randint(1, 2)))
    adventures = [_ADVENTURES[number] for number in chosen]
    plan = [rng.choice(part) for part in (_OPENINGS, _HOMES, _FINDS, _MEETINGS)]
    return " ".join([*plan, *adventures, rng.choice(_ENDINGS)]).format(**words)
