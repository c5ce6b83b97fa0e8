"""The words of self-made records: 160 objects with their plurals, colours, counts and relations."""

from __future__ import annotations

from collections.abc import Mapping

from corl_jax.data.geneval_demands import CLASSES

OWN_OBJECTS = (
    "anchor", "axe", "balloon", "barrel", "basket", "bee", "broom", "bucket", "butterfly",
    "calculator", "camel", "camera", "candle", "castle", "coconut", "coin", "cookie", "crab",
    "crocodile", "crown", "deer", "dolphin", "door", "drum", "envelope", "feather", "flag",
    "fox", "frog", "goat", "gorilla", "guitar", "hammer", "hat", "hedgehog", "helicopter",
    "helmet", "jacket", "kangaroo", "key", "ladder", "lamp", "lemon", "lighthouse", "lion",
    "lizard", "lobster", "mailbox", "microphone", "mirror", "monkey", "mushroom", "octopus",
    "onion", "padlock", "pear", "pencil", "piano", "pig", "pillow", "pineapple", "potato",
    "pumpkin", "rabbit", "rocket", "scarf", "shark", "shoe", "shovel", "snail", "spider",
    "squirrel", "strawberry", "telescope", "tent", "tiger", "tomato", "tractor", "windmill",
    "wolf",
)  # fmt: skip
"""80 countable things that are neither one of COCO's classes nor a kind of one."""

OBJECTS = CLASSES + OWN_OBJECTS
COLORS = (
    "black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
VOWELS = "aeiou"

_PLURALS = {
    "person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors",
    "knife": "knives", "computer mouse": "computer mice", "scarf": "scarves", "wolf": "wolves",
    "deer": "deer", "tomato": "tomatoes", "potato": "potatoes", "butterfly": "butterflies",
    "strawberry": "strawberries",
}  # fmt: skip
_HISSING = ("s", "x", "ch", "sh")  # endings whose plural has -es


def _form_regular_plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(_HISSING) else "s")


PLURALS: Mapping[str, str] = {
    noun: _PLURALS.get(noun) or _form_regular_plural(noun) for noun in OBJECTS
}
"""Object -> its plural."""


def form_geneval_plural(noun: str) -> str:
    """Returns the plural as GenEval writes it: `benchs`, `knifes`, `sheeps`, `buses`."""
    return noun + ("es" if noun.endswith("s") else "s")


def add_article(noun: str) -> str:
    """Returns a noun phrase with `an` before a vowel letter, else with `a`."""
    return f"{'an' if noun[0] in VOWELS else 'a'} {noun}"
