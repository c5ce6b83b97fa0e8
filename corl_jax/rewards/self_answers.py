"""Judges answers to questions about an image by what its prompt demanded; needs no model.

An answer is read as words in a normal form: small letters, punctuation as spaces, no articles,
numbers as digits. Then it is a row of units: classes (in singular or plural), colours, relations
and numbers. The longest name wins, so that a "hot dog" is no dog and "two hundred" is not two.

| tag | an answer is right if |
|---|---|
| single_object | the class occurs |
| two_object | both classes occur |
| counting | the numbers that occur are exactly the one; strict: the class occurs too |
| colors | of the ten colours exactly the right one occurs |
| position | the first class, the relation and the second class occur in this order with no other \
class or relation between, or the inverse with the classes swapped; nothing contradicts it |
| color_attr | each class is bound to its colour and to no other |

`orange` is a fruit and a colour: if the record has the fruit, both readings are tried.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from word2number import w2n

from corl_jax.data.self_questions.known import KNOWN_OBJECTS
from corl_jax.data.self_questions.objects import COLORS, INVERSE, form_geneval_plural
from corl_jax.data.self_questions.records import find_include_problem
from corl_jax.errors import InputError, Problems
from corl_jax.rewards.answers import read_answer
from corl_jax.rewards.numerals import read_number
from corl_jax.rewards.samples import Context, Samples, score_rows

CLASS, COLOR, RELATION, NUMBER, OTHER = "class", "color", "relation", "number", "other"
ARTICLES = ("a", "an", "the")
VERBS = ("is", "are")
RELATION_PHRASES = {
    "left of": "left of", "left side of": "left of",
    "right of": "right of", "right side of": "right of",
    "above": "above", "over": "above", "on top of": "above",
    "below": "below", "under": "below", "beneath": "below",
}  # fmt: skip
"""Words, without articles -> relation. "to the left of" holds "left of"."""
LONGEST_UNIT = 12  # in words
MAX_READINGS = 16  # of the word orange, each as a fruit or as a colour
_WORD = re.compile(r"[^\W_]+")
_SPACES = re.compile(r"\s*")


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a record asks for: a class with number, colour and relation for each kind of object."""

    tag: str
    entries: tuple[Mapping[str, Any], ...]

    @property
    def classes(self) -> list[str]:
        return [entry["class"] for entry in self.entries]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A word or phrase of an answer."""

    kind: str
    name: str  # the class in singular, the colour, the relation, the number, or the word itself
    is_joined: bool  # only spaces are before it, neither punctuation nor an article


def score_self_answer(
    samples: Samples, context: Context, *, strict: bool = False, partial: bool = False
) -> np.ndarray:
    """Returns 1 for an answer that says what the row's prompt demanded, else 0, by rules.

    `strict`: an answer to counting must name the class as well. `partial`: half a point for one of
    two objects (two_object) or of two bound colours (color_attr). NaN without `tag` or `include`.

    Raises:
        InputError: rows whose tag or objects cannot be read, or are not known.
    """
    demands: list[Demand | None] = []
    problems = Problems()
    # All rows before the first score, so that one message lists every bad row.
    for row, (tag, include) in enumerate(
        zip(samples.column("tag"), samples.column("include"), strict=True)
    ):
        with problems.collect(f"row {row}: "):
            demands.append(None if tag is None or include is None else read_demand(tag, include))
    problems.raise_any()

    def judge(completion: str, demand: Demand | None) -> float:
        if demand is None:
            return float("nan")
        return judge_answer(completion, demand, strict=strict, partial=partial)

    return score_rows(judge, samples.require_texts(), demands)


def read_demand(tag: str, include: Any) -> Demand:
    """Returns the demand of the columns `tag` and `include` (a list or its JSON).

    Raises: InputError for what is no record, and for an object that is not known.
    """
    if problem := find_include_problem(include, str(tag)):
        raise InputError(problem)
    entries = json.loads(include) if isinstance(include, str) else include
    return Demand(tag, tuple(entries))


def judge_answer(
    completion: str, demand: Demand, *, strict: bool = False, partial: bool = False
) -> float:
    """Returns 1 for a right answer to the question of the demand, else 0.

    An answer in tags is the content of the tags. `strict`: an answer to counting must name the
    class as well. `partial`: half a point for one of the two objects of two_object, and for one of
    the two bound colours of color_attr.
    """
    units = split_units(read_answer(completion or ""), demand)
    points = max(
        _count_points(reading, demand, strict) for reading in _list_readings(units, demand)
    )
    return points if partial else float(points == 1.0)


def split_units(text: str, demand: Demand) -> list[Unit]:
    """Returns the units of an answer in their order."""
    more = tuple((e["class"], e["plural"]) for e in demand.entries if e.get("plural"))
    phrases, words = _list_phrases(more), _split_words(text)
    units, position = [], 0
    while position < len(words):
        near = [word for word, _ in words[position : position + LONGEST_UNIT]]
        kind, name, length = _read_unit(near, phrases)
        units.append(Unit(kind, name, words[position][1]))
        position += length
    return units


@functools.lru_cache(maxsize=256)
def _list_phrases(more: tuple[tuple[str, str], ...]) -> dict[str, list[tuple[list[str], str, str]]]:
    """Returns first word -> (words, kind, name) of each phrase, the longest first.

    `more` are classes with their plurals beside the known objects.
    """
    named = [(color, COLOR, color) for color in COLORS]
    named += [(phrase, RELATION, name) for phrase, name in RELATION_PHRASES.items()]
    for noun, plural in {**KNOWN_OBJECTS, **dict(more)}.items():
        # GenEval's own plurals are in its published answers: "three persons".
        forms = dict.fromkeys((noun, plural, form_geneval_plural(noun)))
        # The word alone is read as the colour here; `_list_readings` tries the fruit.
        named += [(form, CLASS, noun) for form in forms if form not in COLORS]
    phrases: dict[str, list[tuple[list[str], str, str]]] = {}
    for phrase, kind, name in named:
        words = [word for word, _ in _split_words(phrase)]
        if words:
            phrases.setdefault(words[0], []).append((words, kind, name))
    for choices in phrases.values():
        choices.sort(key=lambda choice: len(choice[0]), reverse=True)
    return phrases


def _split_words(text: str) -> list[tuple[str, bool]]:
    """Returns the words without articles, and whether only spaces are before each."""
    words: list[tuple[str, bool]] = []
    end, is_joined, text = 0, True, text.lower()
    for match in _WORD.finditer(text):
        is_joined = is_joined and _SPACES.fullmatch(text, end, match.start()) is not None
        end = match.end()
        if match.group() in ARTICLES:
            is_joined = False
            continue
        words.append((match.group(), is_joined))
        is_joined = True
    return words


def _read_unit(
    words: Sequence[str], phrases: Mapping[str, list[tuple[list[str], str, str]]]
) -> tuple[str, str, int]:
    """Returns kind, name and number of words of the unit at the start of a text."""
    for phrase, kind, name in phrases.get(words[0], ()):
        if list(words[: len(phrase)]) == phrase:
            return kind, name, len(phrase)
    if words[0].isdecimal():
        return NUMBER, str(int(words[0])) if len(words[0]) < 20 else words[0], 1
    # "two hundred and five" is one number, "two and three" are two of them.
    for length in range(_count_number_words(words), 0, -1):
        number = read_number(" ".join(words[:length])) if words[length - 1] != "and" else None
        if isinstance(number, Fraction):
            return NUMBER, str(number), length
    return OTHER, words[0], 1


def _count_number_words(words: Sequence[str]) -> int:
    names = {*w2n.american_number_system, "and"}
    if words[0] == "and":
        return 0
    return sum(1 for _ in itertools.takewhile(names.__contains__, words))


def _list_readings(units: list[Unit], demand: Demand) -> Iterator[list[Unit]]:
    """Yields the units, with each `orange` as the colour or as the fruit if the record has it."""
    places = [i for i, unit in enumerate(units) if (unit.kind, unit.name) == (COLOR, "orange")]
    kinds = (COLOR, CLASS) if "orange" in demand.classes else (COLOR,)
    for reading in itertools.islice(itertools.product(kinds, repeat=len(places)), MAX_READINGS):
        chosen = list(units)
        for place, kind in zip(places, reading, strict=True):
            chosen[place] = dataclasses.replace(units[place], kind=kind)
        yield chosen


def _count_points(units: list[Unit], demand: Demand, strict: bool) -> float:
    """Returns the fraction of the demand that the answer fulfils: 0, 0.5 or 1."""
    names = {kind: {u.name for u in units if u.kind == kind} for kind in (CLASS, COLOR, NUMBER)}
    first = demand.entries[0]
    if demand.tag == "counting":
        is_named = not strict or first["class"] in names[CLASS]
        return float(names[NUMBER] == {str(first["count"])} and is_named)
    if demand.tag == "colors":
        return float(names[COLOR] == {first["color"]})
    if demand.tag == "position":
        return float(_states_relation(units, demand))
    if demand.tag == "color_attr":
        return max(_count_bound(binding, demand) for binding in _list_bindings(units))
    # single_object: 0 or 1; two_object: half a point for each class.
    return sum(name in names[CLASS] for name in demand.classes) / len(demand.classes)


def _states_relation(units: list[Unit], demand: Demand) -> bool:
    other, subject = demand.classes
    relation = demand.entries[1]["position"][0]
    named = [unit for unit in units if unit.kind in (CLASS, RELATION)]
    statements = {
        (first.name, between.name, last.name)
        for first, between, last in zip(named, named[1:], named[2:], strict=False)
        if (first.kind, between.kind, last.kind) == (CLASS, RELATION, CLASS)
        and {first.name, last.name} == {subject, other}
    }
    true = {(subject, relation, other), (other, INVERSE[relation], subject)}
    return bool(statements) and statements <= true


def _list_bindings(units: list[Unit]) -> Iterator[dict[str, set[str]]]:
    """Yields class -> colours bound to it, for one or two ways to read an answer."""
    named = [unit for unit in units if unit.kind in (CLASS, COLOR)]
    yield _bind_colors(units, before_first=True)
    if named and named[0].kind == CLASS:
        # "car red dog blue" begins with a class, so its colours may follow their classes.
        yield _bind_colors(units, before_first=False)
    elif named:
        # "Red: car, blue: dog" begins with a colour, so each may come before its class.
        joined = [dataclasses.replace(unit, is_joined=True) for unit in units]
        yield _bind_colors(joined, before_first=True)


def _bind_colors(units: list[Unit], *, before_first: bool) -> dict[str, set[str]]:
    """Binds each colour to one class at most.

    First "{class} is {color}". Then "{color} {class}" with only spaces between, and
    "{class} .. {color}" with no class or colour between; `before_first` says in which order.
    """
    bound: dict[int, int] = {}  # place of a colour -> place of its class
    named = [i for i, unit in enumerate(units) if unit.kind in (CLASS, COLOR)]
    following = [
        (class_place, color_place)
        for class_place, color_place in itertools.pairwise(named)
        if (units[class_place].kind, units[color_place].kind) == (CLASS, COLOR)
    ]
    said = [
        (class_place, color_place)
        for class_place, color_place in following
        if color_place == class_place + 2 and units[class_place + 1].name in VERBS
    ]
    before = [
        (place + 1, place)
        for place in named[:-1]
        if units[place].kind == COLOR
        and units[place + 1].kind == CLASS
        and units[place + 1].is_joined
    ]
    for pairs in (said, before, following) if before_first else (said, following, before):
        for class_place, color_place in pairs:
            # A class that has its colour takes no second one from further away. A second one that
            # is as near contradicts the first, so both count.
            is_taken = pairs is following and class_place in bound.values()
            if color_place not in bound and not is_taken:
                bound[color_place] = class_place
    binding: dict[str, set[str]] = {}
    for color_place, class_place in bound.items():
        binding.setdefault(units[class_place].name, set()).add(units[color_place].name)
    return binding


def _count_bound(binding: Mapping[str, set[str]], demand: Demand) -> float:
    right = [binding.get(entry["class"]) == {entry["color"]} for entry in demand.entries]
    return sum(right) / len(right)
