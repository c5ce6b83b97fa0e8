"""Writes the texts of the drawn world: prompts, descriptions, questions and answers."""

from __future__ import annotations

import dataclasses

import numpy as np

from corl_jax.data import instructions
from corl_jax.data.drawn_world.scene import (
    FULL,
    RELATIONS,
    Object,
    Scene,
    Spec,
    World,
    find_clear_relation,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five")
MAX_OPTIONS = 4


@dataclasses.dataclass(frozen=True)
class Fact:
    """A true fact about an image, as a question. `reason` is a phrase that explains the answer."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answer, in the format of the published columns."""

    problem: str  # with the instruction template, if the world has them
    solution: str  # <answer>..</answer>
    kind: str  # MC or OE
    reason: str


def add_article(noun: str) -> str:
    """Returns a noun with its indefinite article."""
    # Every noun of the world begins with a consonant.
    return f"a {noun}"


def make_plural(shape: str) -> str:
    """Returns the plural of a shape."""
    return shape + ("es" if shape.endswith("ss") else "s")


def name_object(item: Object) -> str:
    """Returns the name of an object, such as `red circle`."""
    return f"{item.color} {item.shape}"


def write_caption(rng: np.random.Generator, spec: Spec) -> str:
    """Returns a prompt that demands the spec, in one of a few wordings."""
    include = spec["include"]
    nouns = [" ".join(filter(None, (e.get("color"), e["class"]))) for e in include]
    if spec["category"] == "counting":
        text = f"{NUMBERS[include[0]['count']]} {make_plural(nouns[0])}"
    elif spec["category"] == "position":
        relation = include[1]["position"][0]
        if relation in ("left of", "right of") and rng.integers(2):
            relation = f"to the {relation}"
        text = f"{add_article(nouns[1])} {relation} {add_article(nouns[0])}"
    else:
        text = " and ".join(add_article(noun) for noun in nouns)
    return f"a photo of {text}" if rng.integers(2) else text


def describe_scene(scene: Scene) -> str:
    """Returns all that the image shows, in one short phrase without a full stop."""
    # From left to right; a small share of y orders objects in the same column from top to bottom.
    objects = sorted(scene.objects, key=lambda item: item.x + item.y / 4)
    if len(objects) == 2 and (relation := find_clear_relation(*objects)) is not None:
        first, second = (add_article(name_object(item)) for item in objects)
        return f"{first} {relation} {second}"
    counts: dict[tuple[str, str], int] = {}
    for item in objects:
        counts[item.color, item.shape] = counts.get((item.color, item.shape), 0) + 1
    parts = [
        add_article(f"{color} {shape}") if n == 1 else f"{NUMBERS[n]} {color} {make_plural(shape)}"
        for (color, shape), n in counts.items()
    ]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _exclude(items: tuple[str, ...], answer: str) -> tuple[str, ...]:
    return tuple(item for item in items if item != answer)


def _find_unique(scene: Scene, field: str) -> list[Object]:
    """Returns the objects whose shape (or colour) no other object has."""
    values = [getattr(item, field) for item in scene.objects]
    return [item for item in scene.objects if values.count(getattr(item, field)) == 1]


def _ask_color(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if not (alone := _find_unique(scene, "shape")):
        return None
    item = alone[int(rng.integers(len(alone)))]
    question = f"What color is the {item.shape}?"
    reason = f"the {item.shape} is {item.color}"
    return Fact(question, item.color, _exclude(world.colors, item.color), reason)


def _ask_shape(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if not (alone := _find_unique(scene, "color")):
        return None
    item = alone[int(rng.integers(len(alone)))]
    question = (f"Which shape is {item.color}?", f"What shape is the {item.color} object?")
    reason = f"the {item.color} object is {add_article(item.shape)}"
    return Fact(question[rng.integers(2)], item.shape, _exclude(world.shapes, item.shape), reason)


def _ask_count(rng: np.random.Generator, scene: Scene, world: World) -> Fact:
    shapes = [item.shape for item in scene.objects]
    shape = shapes[int(rng.integers(len(shapes)))]
    if rng.integers(2):
        single, many, count = "object", "objects", len(shapes)
    else:
        single, many, count = shape, make_plural(shape), shapes.count(shape)
    reason = f"there is one {single}" if count == 1 else f"there are {NUMBERS[count]} {many}"
    answer = NUMBERS[count]
    others = _exclude(NUMBERS[1 : world.max_count + 1], answer)
    return Fact(f"How many {many} are there?", answer, others, reason)


def _ask_relation(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if len(scene.objects) != 2:
        return None
    a, b = (scene.objects[i] for i in rng.permutation(2))
    relation = find_clear_relation(a, b)
    if relation is None or name_object(a) == name_object(b):
        return None
    reason = f"the {name_object(a)} is {relation} the {name_object(b)}"
    if rng.integers(2):
        question = f"Where is the {name_object(a)} relative to the {name_object(b)}?"
        return Fact(question, relation, _exclude(RELATIONS, relation), reason)
    drawn = rng.integers((len(world.colors), len(world.shapes)), size=(6, 2))
    decoys = [f"{world.colors[i]} {world.shapes[j]}" for i, j in drawn]
    wrong = tuple(dict.fromkeys([name_object(b), *(d for d in decoys if d != name_object(a))]))
    return Fact(f"What is {relation} the {name_object(b)}?", name_object(a), wrong, reason)


def _ask_existence(rng: np.random.Generator, scene: Scene, world: World) -> Fact:
    # Half of the questions are about an object of the image, so that "yes" is not rare.
    if rng.integers(2):
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        color, shape = item.color, item.shape
    else:
        color = world.colors[int(rng.integers(len(world.colors)))]
        shape = world.shapes[int(rng.integers(len(world.shapes)))]
    present = any((item.color, item.shape) == (color, shape) for item in scene.objects)
    answer = "yes" if present else "no"
    reason = f"there is {'a' if present else 'no'} {color} {shape}"
    return Fact(f"Is there a {color} {shape}?", answer, _exclude(("yes", "no"), answer), reason)


FACTS = (_ask_color, _ask_shape, _ask_count, _ask_relation, _ask_existence)


def ask_question(rng: np.random.Generator, scene: Scene, world: World = FULL) -> Question:
    """Samples a question about the image: multiple choice or open-ended, equally likely."""
    # Some questions do not fit a scene, such as "What color is the circle?" with two circles.
    fact = None
    while fact is None:
        fact = FACTS[int(rng.integers(len(FACTS)))](rng, scene, world)
    if rng.integers(2):
        problem = (
            instructions.ask_open_ended(fact.question) if world.instructions else fact.question
        )
        return Question(problem, f"<answer>{fact.answer}</answer>", "OE", fact.reason)
    wrong = [fact.wrong[i] for i in rng.permutation(len(fact.wrong))[: MAX_OPTIONS - 1]]
    options = [[fact.answer, *wrong][i] for i in rng.permutation(len(wrong) + 1)]
    letter = instructions.OPTION_LETTERS[options.index(fact.answer)]
    with_options = instructions.list_options(fact.question, options)
    return Question(
        instructions.MCQ.format(question=with_options) if world.instructions else with_options,
        f"<answer>{letter}</answer>",
        "MC",
        f"{fact.reason}, option {letter}",
    )


def write_answer(description: str, question: Question, world: World = FULL) -> str:
    """Returns the answer with its reason, in the format that the format reward demands."""
    if not world.instructions:
        return f"<think>{question.reason}</think>{question.solution}"
    return f"<think>the image shows {description}. {question.reason}.</think>{question.solution}"
