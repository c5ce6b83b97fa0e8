"""Records of self-questioning: a prompt, and a question about its image with the true answer.

A record has the form of GenEval's metadata (`tag`, `include`, `exclude` for counting, `prompt`)
with `question` and `answer`. Prompts, questions and answers follow six templates, one a tag. In
the rows of data sets a record is the columns `prompt`, `qa_problem` (the question), `qa_solution`
(the answer), `tag` and `include` (JSON).

Source: showlab/UniRL (arXiv 2505.23380), whose evaluation file has these templates in all rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.data.self_questions.known import KNOWN_OBJECTS
from corl_jax.data.self_questions.objects import (
    COLORS,
    COUNTS,
    RELATIONS,
    TAGS,
    add_article,
)
from corl_jax.nearest import find_near_name, suggest_name

Include = Sequence[Mapping[str, Any]]

COLUMNS = ("prompt", "qa_problem", "qa_solution", "tag", "include")
PROMPT_START = "a photo of "
QUESTIONS = {
    "single_object": "What is the main item in this image?",
    "two_object": "What are two items in this image?",
    "counting": "How many items in this image?",
    "colors": "What is the color of the object?",
    "position": "What are two objects and What is position relationship between two main items? "
    "Use one sentence.",
    "color_attr": "What are two objects and the colors of two objects in the image? "
    "Use one sentence",
}
"""Tag -> question, letter by letter as published: only the one of `position` has a full stop."""

_SIZES = {"single_object": 1, "two_object": 2, "counting": 1, "colors": 1, "position": 2,
          "color_attr": 2}  # fmt: skip
_COLORED = ("colors", "color_attr")
MAX_COUNT = 12  # the largest number that answers may spell as a word
_KEYS = ("class", "count", "color", "position", "plural")


@dataclasses.dataclass(frozen=True)
class Record:
    """A record; `include` has an entry {class, count, color?, position?} for each kind of object.

    An entry may have `plural`, for an object that is not in `objects.OBJECTS`.
    """

    tag: str
    include: Include
    prompt: str
    question: str
    answer: str

    @property
    def exclude(self) -> list[dict[str, Any]]:
        """What GenEval forbids: one object more than counting demands."""
        if self.tag != "counting":
            return []
        (entry,) = self.include
        return [{"class": entry["class"], "count": entry["count"] + 1}]

    def as_row(self) -> dict[str, str]:
        """Returns the columns of a data set."""
        include = json.dumps(list(self.include))
        return dict(
            zip(COLUMNS, (self.prompt, self.question, self.answer, self.tag, include), strict=True)
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the record as a line of the published files."""
        exclude = {"exclude": self.exclude} if self.exclude else {}
        return {
            "tag": self.tag, "include": list(self.include), **exclude, "prompt": self.prompt,
            "question": self.question, "answer": self.answer,
        }  # fmt: skip


def make_record(tag: str, include: Include, prompt: str | None = None) -> Record:
    """Returns the record that the templates make of a tag and its objects.

    `prompt` is that of a given file, such as GenEval's; None: it is written by the template.
    """
    prompt = write_prompt(tag, include) if prompt is None else prompt
    return Record(tag, include, prompt, QUESTIONS[tag], write_answer(tag, include, prompt))


def write_prompt(tag: str, include: Include) -> str:
    """Returns the prompt in GenEval's words."""
    nouns = [" ".join(filter(None, (entry.get("color"), entry["class"]))) for entry in include]
    if tag == "counting":
        (entry,) = include
        plural = entry.get("plural") or KNOWN_OBJECTS[entry["class"]]
        text = f"{COUNTS[entry['count']]} {plural}"
    elif tag == "position":
        # {"class": "cat"}, {"class": "dog", "position": ["left of", 0]} -> a dog left of a cat
        relation = include[1]["position"][0]
        text = f"{add_article(nouns[1])} {relation} {add_article(nouns[0])}"
    else:
        text = " and ".join(map(add_article, nouns))
    return PROMPT_START + text


def write_answer(tag: str, include: Include, prompt: str) -> str:
    """Returns the true answer to the question of the tag about an image of the prompt."""
    first, last = include[0], include[-1]
    if tag == "two_object":
        # The published answers never say "an".
        return f"There is a {first['class']} and a {last['class']}"
    if tag == "counting":
        # In the words of the prompt: GenEval writes "two toothbrushs".
        return prompt.removeprefix(PROMPT_START)
    if tag == "colors":
        return str(first["color"])
    if tag == "position":
        return f"The {last['class']} is {last['position'][0]} the {first['class']}"
    if tag == "color_attr":
        return " and ".join(
            f"{start} {entry['class']} is {entry['color']}"
            for start, entry in zip(("The", "the"), include, strict=True)
        )
    return str(first["class"])


def find_include_problem(include: Any, tag: str | None = None) -> str | None:
    """Returns what is wrong with the objects of a record, with the remedy, or None.

    `include` is a list or its JSON. Without a tag only what all tags demand is checked.
    """
    if tag is not None and tag not in TAGS:
        return f"tag: found {tag[:60]!r}; {suggest_name(tag[:60], TAGS)}"
    try:
        entries = json.loads(include) if isinstance(include, str) else include
    except (ValueError, RecursionError) as error:
        return f"include: not valid JSON ({error}); expected a list of objects as GenEval has it"
    sizes = [_SIZES[tag]] if tag else [1, 2]
    if not isinstance(entries, list) or len(entries) not in sizes:
        kind = f" for tag {tag}" if tag else ""
        return (
            f"include: found {_shorten(entries)}; expected a list of "
            f"{' or '.join(map(str, sizes))} entries{kind}"
        )
    for number, entry in enumerate(entries):
        problem = _find_entry_problem(entry)
        if problem is None and tag is not None:
            problem = _find_demand_problem(tag, number, entry)
        if problem:
            return f"include[{number}]: {problem}"
    if len({entry["class"] for entry in entries}) < len(entries):
        return f"include: found the class {entries[0]['class']} twice; expected two classes"
    return None


def _find_entry_problem(entry: Any) -> str | None:
    """Returns what is wrong with an entry under every tag, or None."""
    if not isinstance(entry, dict):
        return f"found {_shorten(entry)}; expected {{class, count, color?, position?}}"
    if unknown := sorted(map(str, entry.keys() - set(_KEYS))):
        return f"{unknown[0]}: unknown key; expected {', '.join(_KEYS)}"
    noun, count, plural = entry.get("class"), entry.get("count"), entry.get("plural")
    if not isinstance(noun, str) or not noun.strip():
        return f"class: found {_shorten(noun)}; expected the name of an object"
    if plural is not None and not (isinstance(plural, str) and plural.strip()):
        return f"plural: found {_shorten(plural)}; expected the plural of {noun}"
    if noun not in KNOWN_OBJECTS and plural is None:
        near = find_near_name(noun[:60], KNOWN_OBJECTS)
        return (
            f"class: {noun[:60]!r} is not one of the {len(KNOWN_OBJECTS)} known objects"
            f"{f'; did you mean {near!r}?' if near else ''}; take a known one, or say how the "
            'plural is written, as "plural": TEXT in the same entry, so that answers can be judged'
        )
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        return f"count: found {_shorten(count)}; expected a whole number from 1 to {MAX_COUNT}"
    if entry.get("color") not in (None, *COLORS):
        return f"color: found {_shorten(entry['color'])}; expected one of {', '.join(COLORS)}"
    position: Any = entry.get("position")
    if position is not None and not (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and position[1] == 0
    ):
        return (
            f"position: found {_shorten(position)}; expected [RELATION, 0] with RELATION one of "
            f"{', '.join(RELATIONS)}"
        )
    return None


def _find_demand_problem(tag: str, number: int, entry: Mapping[str, Any]) -> str | None:
    """Returns what a valid entry lacks, or has too much, for its tag."""
    if (tag == "counting") != (entry["count"] > 1):
        bounds = f"2 to {MAX_COUNT}" if tag == "counting" else "1"
        return f"count: found {entry['count']}; expected {bounds} for tag {tag}"
    if tag in _COLORED and entry.get("color") is None:
        return f"color: missing; expected one of {', '.join(COLORS)} for tag {tag}"
    needs_position = tag == "position" and number == 1
    if needs_position != (entry.get("position") is not None):
        return (
            f"position: {'missing' if needs_position else 'found one'}; expected one in the "
            "second entry of tag position, and nowhere else"
        )
    return None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}.."
