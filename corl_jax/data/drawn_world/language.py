"""The drawn world in words: captions, descriptions, questions with answers, and worked answers."""

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
    clear_relation,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five")
MAX_OPTIONS = 4


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something true of a picture, as a question; the reason is the sentence that answers it."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact as the published columns hold it."""

    problem: str  # with the instruction template, if the world has them
    solution: str  # <answer>..</answer>
    kind: str  # MC or OE
    reason: str


def article(noun: str) -> str:
    """The noun with its indefinite article; every word of the world begins with a consonant."""
    return f"a {noun}"


def plural(shape: str) -> str:
    """The shape's plural."""
    return shape + ("es" if shape.endswith("ss") else "s")


def named(one: Object) -> str:
    """`red circle`."""
    return f"{one.color} {one.shape}"


def caption(rng: np.random.Generator, spec: Spec) -> str:
    """The prompt that demands the spec, worded in one of a few ways."""
    include = spec["include"]
    nouns = [" ".join(filter(None, (e.get("color"), e["class"]))) for e in include]
    if spec["category"] == "counting":
        text = f"{NUMBERS[include[0]['count']]} {plural(nouns[0])}"
    elif spec["category"] == "position":
        relation = include[1]["position"][0]
        if relation in ("left of", "right of") and rng.integers(2):
            relation = f"to the {relation}"
        text = f"{article(nouns[1])} {relation} {article(nouns[0])}"
    else:
        text = " and ".join(article(noun) for noun in nouns)
    return f"a photo of {text}" if rng.integers(2) else text


def describe(scene: Scene) -> str:
    """All that the picture holds, in one short phrase without a full stop."""
    objects = sorted(scene.objects, key=lambda one: one.x + one.y / 4)
    if len(objects) == 2 and (relation := clear_relation(*objects)) is not None:
        return f"{article(named(objects[0]))} {relation} {article(named(objects[1]))}"
    counts: dict[tuple[str, str], int] = {}
    for one in objects:
        counts[one.color, one.shape] = counts.get((one.color, one.shape), 0) + 1
    parts = [
        article(f"{color} {shape}") if n == 1 else f"{NUMBERS[n]} {color} {plural(shape)}"
        for (color, shape), n in counts.items()
    ]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _others(items: tuple[str, ...], answer: str) -> tuple[str, ...]:
    return tuple(item for item in items if item != answer)


def _alone(scene: Scene, field: str) -> list[Object]:
    """The objects whose shape (or colour) no other object has."""
    values = [getattr(one, field) for one in scene.objects]
    return [one for one in scene.objects if values.count(getattr(one, field)) == 1]


def _color(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if not (alone := _alone(scene, "shape")):
        return None
    one = alone[int(rng.integers(len(alone)))]
    question = f"What color is the {one.shape}?"
    reason = f"the {one.shape} is {one.color}"
    return Fact(question, one.color, _others(world.colors, one.color), reason)


def _shape(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if not (alone := _alone(scene, "color")):
        return None
    one = alone[int(rng.integers(len(alone)))]
    question = (f"Which shape is {one.color}?", f"What shape is the {one.color} object?")
    reason = f"the {one.color} object is {article(one.shape)}"
    return Fact(question[rng.integers(2)], one.shape, _others(world.shapes, one.shape), reason)


def _count(rng: np.random.Generator, scene: Scene, world: World) -> Fact:
    shapes = [one.shape for one in scene.objects]
    shape = shapes[int(rng.integers(len(shapes)))]
    if rng.integers(2):
        single, many, count = "object", "objects", len(shapes)
    else:
        single, many, count = shape, plural(shape), shapes.count(shape)
    reason = f"there is one {single}" if count == 1 else f"there are {NUMBERS[count]} {many}"
    answer = NUMBERS[count]
    others = _others(NUMBERS[1 : world.max_count + 1], answer)
    return Fact(f"How many {many} are there?", answer, others, reason)


def _relation(rng: np.random.Generator, scene: Scene, world: World) -> Fact | None:
    if len(scene.objects) != 2:
        return None
    a, b = (scene.objects[i] for i in rng.permutation(2))
    relation = clear_relation(a, b)
    if relation is None or named(a) == named(b):
        return None
    reason = f"the {named(a)} is {relation} the {named(b)}"
    if rng.integers(2):
        question = f"Where is the {named(a)} relative to the {named(b)}?"
        return Fact(question, relation, _others(RELATIONS, relation), reason)
    drawn = rng.integers((len(world.colors), len(world.shapes)), size=(6, 2))
    decoys = [f"{world.colors[i]} {world.shapes[j]}" for i, j in drawn]
    wrong = tuple(dict.fromkeys([named(b), *(d for d in decoys if d != named(a))]))
    return Fact(f"What is {relation} the {named(b)}?", named(a), wrong, reason)


def _exists(rng: np.random.Generator, scene: Scene, world: World) -> Fact:
    if rng.integers(2):
        one = scene.objects[int(rng.integers(len(scene.objects)))]
        color, shape = one.color, one.shape
    else:
        color = world.colors[int(rng.integers(len(world.colors)))]
        shape = world.shapes[int(rng.integers(len(world.shapes)))]
    present = any((one.color, one.shape) == (color, shape) for one in scene.objects)
    answer = "yes" if present else "no"
    reason = f"there is {'a' if present else 'no'} {color} {shape}"
    return Fact(f"Is there a {color} {shape}?", answer, _others(("yes", "no"), answer), reason)


FACTS = (_color, _shape, _count, _relation, _exists)


def ask(rng: np.random.Generator, scene: Scene, world: World = FULL) -> Question:
    """Draws a question about the picture, multiple choice or open-ended with equal probability."""
    fact = None
    while fact is None:
        fact = FACTS[int(rng.integers(len(FACTS)))](rng, scene, world)
    if rng.integers(2):
        problem = instructions.open_ended(fact.question) if world.instructions else fact.question
        return Question(problem, f"<answer>{fact.answer}</answer>", "OE", fact.reason)
    wrong = [fact.wrong[i] for i in rng.permutation(len(fact.wrong))[: MAX_OPTIONS - 1]]
    options = [[fact.answer, *wrong][i] for i in rng.permutation(len(wrong) + 1)]
    letter = instructions.OPTION_LETTERS[options.index(fact.answer)]
    listed = instructions.list_options(fact.question, options)
    return Question(
        instructions.MCQ.format(question=listed) if world.instructions else listed,
        f"<answer>{letter}</answer>",
        "MC",
        f"{fact.reason}, option {letter}",
    )


def sft_answer(description: str, question: Question, world: World = FULL) -> str:
    """The worked answer in the format that the format reward asks for."""
    if not world.instructions:
        return f"<think>{question.reason}</think>{question.solution}"
    return f"<think>the image shows {description}. {question.reason}.</think>{question.solution}"
