"""Reads and checks single values of the columns that rewards and evaluations use."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from typing import Any, Literal

from corl_jax.data.drawn_world.scene import CATEGORIES, RELATIONS
from corl_jax.data.geneval_demands import parse_demand
from corl_jax.data.self_questions.records import find_include_problem
from corl_jax.errors import InputError

MAX_OBJECTS = 2**16  # of one class in a spec
MAX_SHOWN_CHARACTERS = 200  # of a value in a message

QuestionType = Literal["MC", "OE"]
_SEPARATORS = re.compile(r"[\s_\-\u2010-\u2015./]+")
QUESTION_TYPES: dict[str, QuestionType] = {
    **dict.fromkeys(
        ("mc", "mcq", "mcqs", "mcqa", "multichoice", "multiplechoice", "multiplechoices",
         "multichoicequestion", "multiplechoicequestion", "multiplechoicequestions",
         "singlechoice", "choice"),
        "MC",
    ),
    **dict.fromkeys(
        ("oe", "oeq", "open", "openend", "openended", "openquestion", "openendquestion",
         "openendedquestion", "openendedquestions", "freeform", "freetext", "shortanswer"),
        "OE",
    ),
}  # fmt: skip
"""A question's type as data sets spell it, in small letters without separators -> the type."""


def read_question_type(value: str | None) -> QuestionType | None:
    """Returns MC or OE for any of the usual spellings, None for null and for blank text.

    Case, spaces, dashes and underscores do not matter: "Multiple Choice" is MC.

    Raises:
        InputError: any other text.
    """
    if value is None or not value.strip():
        return None
    kind = QUESTION_TYPES.get(_SEPARATORS.sub("", value).lower())
    if kind is None:
        raise InputError(
            f"found {value[:60]!r}, expected MC or OE (also spelt mcq, multiple choice, open, "
            "open-ended, free-form, ..)"
        )
    return kind


def find_value_problem(
    name: str, value: Any, columns: Mapping[str, Any] = types.MappingProxyType({})
) -> str | None:
    """Returns the problem of a value of the column `name`, or None. It does not check images.

    `columns` are all values of the row, where they are known.
    """
    # Null is allowed in every column: the reward then does not apply to the row.
    if value is None:
        return None
    if name == "spec":
        return find_spec_problem(value)
    if name == "geneval":
        return _find_demand_problem(value)
    if name == "include":
        tag = columns.get("tag")
        return find_include_problem(value, None if tag is None else str(tag))
    if name == "od_solution" and isinstance(value, list):
        boxes = all(isinstance(box, list) and len(box) == 4 for box in value)
        sides = [side for box in value for side in box] if boxes else []
        # type(), because True is an int as well; Python ints of a JSON file have no limit.
        boxes = boxes and all(type(side) in (int, float) and abs(side) < 2**31 for side in sides)
        return None if boxes else f"found {_shorten(value)}, expected [[x1, y1, x2, y2], ..]"
    if not isinstance(value, str):
        return f"found {_shorten(value)}, expected a text"
    if name == "qa_type":
        try:
            read_question_type(value)
        except InputError as error:
            return str(error)
    return None


def find_spec_problem(value: Any) -> str | None:
    """Returns the problem of a spec of the drawn world (dict or JSON), or None."""
    expected = (
        "expected {category, include: [{class, count, color?, position?}, ..]}, count a whole "
        "number from 1, position [relation, index of an entry]"
    )
    try:
        spec = json.loads(value) if isinstance(value, str) else value
        include = spec["include"]
        valid = spec["category"] in CATEGORIES and isinstance(include, list) and bool(include)
        for entry in include:
            # An entry without a position passes as if it had a valid one.
            relation, other = entry.get("position", (RELATIONS[0], 0))
            valid = valid and isinstance(entry["class"], str) and relation in RELATIONS
            valid = valid and isinstance(entry.get("color"), str | None)
            valid = valid and _is_whole_number(entry["count"], 1, MAX_OBJECTS)
            valid = valid and type(other) is int and 0 <= other < len(include)
    # A spec can be any JSON. It is read as if it were valid, and each way to fail is a problem.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:MAX_SHOWN_CHARACTERS]
        return f"found {_shorten(value)} ({why}); {expected}"
    return None if valid else f"found {_shorten(value)}; {expected}"


def _find_demand_problem(value: Any) -> str | None:
    try:
        parse_demand(value)
    except InputError as error:
        return "; ".join(error.problems)
    return None


def _is_whole_number(value: Any, lowest: int, highest: int) -> bool:
    """Returns whether a value is a whole number in these bounds; 2.0 is one."""
    # Tables write whole numbers as floats where a column has missing values.
    return type(value) in (int, float) and lowest <= value <= highest and value == int(value)


def _shorten(value: Any) -> str:
    """Returns a text of a value for a message. The value may be very long or deeply nested."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}.."
