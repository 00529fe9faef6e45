"""The words that the curriculum is written with.

Every word here that can be a recalled value or a copied word is one token of the tokenizer,
both with a blank before it and without.
"""

COLORS = "red blue green yellow orange purple pink brown black white gray silver".split()
FRUITS = "apple pear plum cherry lemon mango peach grape melon banana".split()
ANIMALS = (
    "fox bear wolf rabbit mouse cat dog owl frog turtle horse deer hedgehog squirrel duck goat sheep lion tiger "
    "monkey parrot penguin whale otter badger"
).split()
OBJECTS = (
    "lamp map coin bell drum kite book ring cup boat hat box rope stone shell feather basket ladder candle "
    "mirror clock wagon flute blanket lantern needle button bottle spoon"
).split()
NATURE = "moon star sun cloud river forest snow rain wind leaf rose tulip pine oak sand".split()
FOODS = "bread honey cheese soup cake rice milk tea salt sugar".split()

ADJECTIVES = (
    "small big brave shy clever kind old young happy hungry curious gentle quick quiet lazy proud friendly tired "
    "lucky silly"
).split()
QUALITIES = "shiny golden broken tiny heavy strange beautiful dusty magic wooden".split()
FEELINGS = "happy glad proud calm thankful sleepy".split()

PLACES = (
    "forest village valley meadow garden castle cave harbor mountain island farm barn lake river bridge tower market "
    "field beach hill"
).split()
NAMES = (
    "Ada Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tara Viktor Wendy Yara "
    "Zoe Anna Oscar Lily Max Nina Tom Ruby"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Athens Prague Warsaw Cairo Tokyo Beijing Delhi Ottawa "
    "Lima Helsinki Stockholm"
).split()
CAPITALS = dict(
    zip(
        "France England Germany Spain Italy Austria Norway Portugal Ireland Greece Czechia Poland Egypt Japan China "
        "India Canada Peru Finland Sweden".split(),
        CITIES,
        strict=True,
    )
)
JOBS = "teacher baker doctor farmer painter pilot nurse singer writer cook".split()

KEYS = [f"{number:02x}" for number in range(256)]
"""The keys of the recall task: all two-digit hexadecimal numbers."""

VALUES = COLORS + FRUITS + ANIMALS + OBJECTS + NATURE + FOODS
"""The values that a key of the recall task can have."""

COPY_WORDS = sorted({*VALUES, *ADJECTIVES, *QUALITIES, *PLACES, *JOBS})
"""The words that the copying task is made of."""
