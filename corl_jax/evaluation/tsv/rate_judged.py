"""Rates what rules alone can read of the data sets that need a judge.

Source: VLMEvalKit `vlmeval/dataset/utils/mathvista.py`, `mathv.py` and `wemath.py`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from corl_jax.evaluation.bootstrap import average_units
from corl_jax.evaluation.matching.matchers import Matcher, infer_choice
from corl_jax.evaluation.tsv.rating import (
    OVERALL,
    PER_CENT,
    Rating,
    RatingOptions,
    Verdict,
    rate_hits,
    score_strata,
)
from corl_jax.evaluation.tsv.table import HIT, OPTION_LETTERS, PREDICTION, Values
from corl_jax.evaluation.units import Unit

BOXED = re.compile(r"\\boxed\{([^}]*)\}")
COMPOSITES = 525
"""Composite problems of WeMath: the harness divides by it, whatever it finds."""
COMPOSITE_STEPS = (2, 3)
WEMATH_MARKS = str.maketrans("", "", "<>:.")
WEMATH_LETTERS = "ABCDEFGH"
KNOWLEDGE, GENERALIZATION = "InsufficientKnowledge", "InadequateGeneralization"
MASTERY, ROTE = "CompleteMastery", "RoteMemorization"
SHARES = (KNOWLEDGE, GENERALIZATION, MASTERY, ROTE)
"""WeMath's four results of a composite problem."""
READINGS = ("Strict", "Loose")

Prefetch = Callable[[Values, Matcher], Any]
"""(row, matcher) -> what the rules read of its prediction, or False."""


def rate_nothing(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates nothing: the answers need a judge."""
    del rows, options
    return Rating(is_final=False)


def rate_mathvista(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates by task and skill how many of MathVista's answers the rules read, and take as right."""
    groups = [[row.get("task"), *_read_skills(row.get("skills"))] for row in rows]
    return _report_prefetch(
        rows, groups, "Task&Skill", prefetch_mathvista, check_mathvista, options.matcher
    )


def prefetch_mathvista(row: Values, matcher: Matcher) -> Any:
    """Returns the letter that the rules read, or a number if it is the true one; else False.

    A true 0 counts as not read, and texts and lists are never read, as in the harness.
    """
    if row.get("question_type") == "multi_choice":
        return infer_choice(row[PREDICTION], _letter_choices(row), matcher)
    result = _read_number(row[PREDICTION], row.get("answer_type"))
    truth = _read_number(row.get("answer"), row.get("answer_type"))
    return (result is not None and result == truth) and result


def check_mathvista(row: Values, result: Any) -> bool:
    """Returns whether a prefetched result is right."""
    if row.get("question_type") == "multi_choice":
        return result == row.get("answer_option")
    return bool(result)


def rate_mathvision(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates by subject how many of MathVision's answers the rules read, and take as right."""
    groups = [[row.get("category")] for row in rows]
    return _report_prefetch(
        rows, groups, "Subject", prefetch_mathvision, check_mathvision, options.matcher
    )


def prefetch_mathvision(row: Values, matcher: Matcher) -> Any:
    """Returns the letter that the rules read, or a text that equals the answer; else False.

    The harness also compares LaTeX by value, which is left to it.
    """
    boxed = BOXED.search(row[PREDICTION])
    response = boxed.group(1) if boxed else row[PREDICTION]
    choices = _letter_choices(row)
    if choices:
        return infer_choice(response, choices, matcher)
    return response if _are_equal(response, str(row.get("answer"))) else False


def check_mathvision(row: Values, result: Any) -> bool:
    """Returns whether a prefetched result is right."""
    return bool(result) and _are_equal(str(result), str(row.get("answer")))


# ---- WeMath


def rate_wemath(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates WeMath's composite problems by the letter behind the last word "Answer", or by `hit`.

    A composite is right or wrong as a whole, and so is each of its steps. Both steps wrong, or for
    `Loose` all of them, and the whole right is rote memorization.
    """
    del options
    letters = [read_wemath_letter(row[PREDICTION]) for row in rows]
    rating = Rating(
        verdicts=[
            Verdict(row["index"], letter, _is_right_wemath(row, letter))
            for row, letter in zip(rows, letters, strict=True)
        ],
        notes=["read by letters alone; the harness's default judge gpt-4o-mini reads more answers"],
    )
    right = {
        (str(row.get("key")), str(row.get("ID"))): verdict.correct
        for row, verdict in zip(rows, rating.verdicts, strict=True)
    }
    composites = _find_composites(right)
    if len(composites) != COMPOSITES:
        rating.notes.append(
            f"WeMath: found {len(composites)} composite problems; the harness divides by "
            f"{COMPOSITES}, as here"
        )
    line: dict[str, Any] = {}
    for reading in READINGS:
        kinds = [_classify(steps, whole, reading) for steps, whole in composites.values()]
        line |= _report_wemath(rating, reading, kinds)
    rating.table.append(line)
    rating.units = [
        Unit(f"{steps}steps/{name}", f"{steps}steps", _score_composite(*results))
        for (steps, name), results in composites.items()
    ]
    return rating


def read_wemath_letter(prediction: str) -> str | None:
    """Returns the first letter behind the last "Answer", if it is one of A to H."""
    text = prediction.split("Answer")[-1].strip().translate(WEMATH_MARKS).strip()
    return text[0] if text and text[0] in WEMATH_LETTERS else None


def _is_right_wemath(row: Values, letter: str | None) -> bool:
    if row.get(HIT) is not None:
        return bool(row[HIT])
    return letter is not None and letter == row.get("answer")


def _find_composites(
    right: dict[tuple[str, str], bool],
) -> dict[tuple[int, str], tuple[list[bool | None], bool | None]]:
    """Returns (steps, ID) -> (whether each step is right, whether the whole is).

    A row that is not there has None, and only some of the harness's conditions hold.
    """
    composites = {}
    for steps in COMPOSITE_STEPS:
        for key, name in right:
            if key == f"{steps}steps_1":
                parts = [right.get((f"{steps}steps_{i}", name)) for i in range(1, steps + 1)]
                composites[steps, name] = (parts, right.get((f"{steps}steps_multi", name)))
    return composites


def _classify(steps: Sequence[bool | None], whole: bool | None, reading: str) -> str | None:
    """Returns one of SHARES; None if rows that are not there leave it open."""
    if whole is None:
        return None
    all_right, any_wrong = all(step is True for step in steps), False in steps
    if not whole:
        return GENERALIZATION if all_right else KNOWLEDGE if any_wrong else None
    if reading == "Loose":
        all_wrong = all(step is False for step in steps)
        return MASTERY if True in steps else ROTE if all_wrong else None
    return MASTERY if all_right else ROTE if any_wrong else None


def _score_composite(steps: Sequence[bool | None], whole: bool | None) -> dict[str, float]:
    return {
        f"score_{reading.lower()}": _value_of(_classify(steps, whole, reading))
        for reading in READINGS
    }


def _value_of(kind: str | None) -> float:
    # As the harness's formula: all points, less those that are lost.
    return 1.0 - {KNOWLEDGE: 1.0, ROTE: 1.0, GENERALIZATION: 0.5}.get(kind or "", 0.0)


def _report_wemath(rating: Rating, reading: str, kinds: Sequence[str | None]) -> dict[str, Any]:
    """Returns the harness's values of a reading, in per cent; adds them with intervals."""
    counts = {name: kinds.count(name) for name in SHARES}
    lost = counts[KNOWLEDGE] + counts[ROTE] + 0.5 * counts[GENERALIZATION]
    line: dict[str, Any] = {f"Score ({reading})": PER_CENT * (COMPOSITES - lost) / COMPOSITES}
    for name in SHARES:
        # Rote memorization is a share of those whose whole is right.
        among = [kind for kind in kinds if kind in (MASTERY, ROTE)] if name == ROTE else kinds
        total = len(among) if name == ROTE else COMPOSITES
        share = PER_CENT * counts[name] / total if total else math.nan
        line[f"{name} ({reading})"] = share
        line[f"{name} ({reading}) count"] = counts[name]
        rating.rates[f"{name} ({reading})"] = rate_hits([kind == name for kind in among])
    if kinds:
        values = np.array([_value_of(kind) for kind in kinds])
        # The composites that are not there count as right in the harness's formula.
        scale = len(kinds) / COMPOSITES
        rating.scores[f"Score ({reading})"] = score_strata(
            line[f"Score ({reading})"],
            [values],
            lambda strata: PER_CENT * (1 - scale + scale * average_units(strata)),
        )
    return line


# ---- helpers


def _report_prefetch(
    rows: Sequence[Values], groups: Sequence[Sequence[Any]], title: str, prefetch: Prefetch,
    check: Callable[[Values, Any], bool], matcher: Matcher,
) -> Rating:  # fmt: skip
    results = [prefetch(row, matcher) for row in rows]
    hits = [bool(x) and check(row, x) for row, x in zip(rows, results, strict=True)]
    verdicts = [
        Verdict(row["index"], str(x) if x else None, hit)
        for row, x, hit in zip(rows, results, hits, strict=True)
    ]
    members: dict[str, list[int]] = {OVERALL: list(range(len(rows)))}
    for number, names in enumerate(groups):
        for name in names:
            members.setdefault(str(name), []).append(number)
    rating = Rating(verdicts=verdicts, is_final=False)
    for name, numbers in members.items():
        fetched = [bool(results[n]) for n in numbers]
        # No key is named accuracy: the judge may still take other answers as right.
        rating.table.append(
            {title: name, "tot": len(numbers), "prefetch": sum(fetched),
             "prefetch_rate": PER_CENT * sum(fetched) / len(numbers),
             "prefetched_right": sum(hits[n] for n in numbers)}
        )  # fmt: skip
    rating.rates["prefetch"] = rate_hits([bool(result) for result in results])
    return rating


def _read_skills(value: Any) -> list[str]:
    try:
        skills = ast.literal_eval(str(value))
    except (ValueError, SyntaxError):
        skills = value
    return [str(skill) for skill in skills] if isinstance(skills, list | tuple) else [str(skills)]


def _letter_choices(row: Values) -> dict[str, Any]:
    """Returns letter -> choice of the Python list in column `choices`; nothing if there is none."""
    try:
        choices = ast.literal_eval(str(row.get("choices")))
    except (ValueError, SyntaxError):
        return {}
    return dict(zip(OPTION_LETTERS, choices, strict=False)) if isinstance(choices, list) else {}


def _read_number(value: Any, kind: Any) -> int | float | None:
    """Returns the number of a whole text; None for another kind or text."""
    try:
        if kind == "integer":
            return int(value)
        return float(value) if kind == "float" else None
    except (ValueError, TypeError):
        return None


def _are_equal(first: str, second: str) -> bool:
    first, second = first.lower().strip(), second.lower().strip()
    if first == second:
        return True
    try:
        return abs(float(first) - float(second)) < 1e-6
    except ValueError:
        return False
