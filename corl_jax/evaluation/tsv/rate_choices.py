"""Rates choice questions as VLMEvalKit does: plain, circular, and MMMU.

Source: VLMEvalKit `vlmeval/dataset/utils/multiple_choice.py`, with exact matching.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from typing import Any

from corl_jax.evaluation.matching import mmmu
from corl_jax.evaluation.matching.matchers import Matcher, infer_choice
from corl_jax.evaluation.tsv.rating import (
    NO_SPLIT,
    OVERALL,
    Rating,
    RatingOptions,
    Verdict,
    average,
    describe_missing_answers,
    group_rows,
    has_column,
    make_units,
    rate_hits,
)
from corl_jax.evaluation.tsv.table import OPTION_LETTERS, PREDICTION, Values, list_options

ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""MMBench's abilities in the harness's table."""
ROTATION = 10**6
"""Rows from this index on are rotations of the row with the index modulo it."""
OTHER_ANSWERS = "Other Answers"
PARSER = "mmmu-parser"
"""The name of MMMU's own rules in reports."""


def rate_choices(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates each question by itself."""
    verdicts = [_judge(row, options.matcher) for row in rows]
    return _report(rows, verdicts, verdicts, describe_missing_answers(rows))


def rate_circular(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates a question as right if all its rotations are; only base rows count.

    Rotations without their base row do not count.
    """
    verdicts = [_judge(row, options.matcher) for row in rows]
    groups: dict[Any, list[Verdict]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        groups.setdefault(find_base(row), []).append(verdict)
    base_rows = [row for row in rows if row["index"] == find_base(row)]
    base_verdicts = [
        Verdict(row["index"], None, all(v.correct for v in groups[row["index"]]))
        for row in base_rows
    ]
    sizes = {len(group) for group in groups.values()}
    notes = describe_missing_answers(rows)
    notes.append(f"{len(base_rows)} questions with {min(sizes)} to {max(sizes)} rotations")
    lost = len(rows) - sum(len(groups[row["index"]]) for row in base_rows)
    if lost:
        notes.append(f"{lost} rows are rotations of questions that are not there; left out")
    return _report(base_rows, base_verdicts, verdicts, notes)


def find_base(row: Values) -> Any:
    """Returns the index of the question that a row is a rotation of."""
    if row.get("g_index") is not None:
        return row["g_index"]
    return row["index"] % ROTATION if isinstance(row["index"], int) else row["index"]


def rate_mmmu(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates MMMU by VLMEvalKit's rules, and beside it by MMMU's own.

    A row without options becomes a choice between its answer and "Other Answers".
    """
    choices = [_make_choice_of_open(row) for row in rows]
    verdicts = [_judge(row, options.matcher) for row in choices]
    rating = _report(choices, verdicts, verdicts, describe_missing_answers(rows))
    num_open = sum(not _has_options(row) for row in rows)
    rating.notes.append(f"{num_open} open questions became choices, as in VLMEvalKit")
    chance = None if options.guess_seed is None else random.Random(options.guess_seed)
    results = [judge_by_parser(row, chance) for row in rows]
    for split, numbers in _group_splits(rows).items():
        rating.rates[f"{PARSER}/{split}"] = rate_hits([results[n][0] for n in numbers])
    guesses = sum(is_guess for _, is_guess in results)
    how = "count as wrong" if chance is None else f"are random, with seed {options.guess_seed}"
    rating.notes.append(f"{PARSER}: {guesses} answers without a letter {how}")
    return rating


def judge_by_parser(row: Values, chance: random.Random | None) -> tuple[bool, bool]:
    """Returns whether MMMU's own rules take an answer as right, and whether they would guess."""
    truth, prediction = read_truth(row.get("answer")), row[PREDICTION]
    if not _has_options(row):
        return mmmu.is_right_open(truth, mmmu.parse_open(prediction)), False
    texts = {letter: str(value) for letter, value in list_options(row).items()}
    letter = mmmu.parse_choice(prediction, texts)
    is_guess = letter is None
    if is_guess and chance is not None:
        letter = chance.choice(list(texts))
    return mmmu.is_right_choice(truth, letter), is_guess


def read_truth(answer: Any) -> str | list[str]:
    """Returns the true answer, or the list of answers that a text such as "['2', 'two']" states."""
    text = str(answer)
    if text.startswith("[") and text.endswith("]"):
        try:
            return [str(value) for value in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return text
    return text


def _has_options(row: Values) -> bool:
    return row.get("A") is not None


def _make_choice_of_open(row: Values) -> Values:
    answer = row.get("answer")
    # Any answer that is no letter becomes 'A', also where the row has options.
    truth = answer if isinstance(answer, str) and answer in list(OPTION_LETTERS) else "A"
    if _has_options(row):
        return {**row, "answer": truth}
    return {**row, "A": answer, "B": OTHER_ANSWERS, "answer": truth}


def _judge(row: Values, matcher: Matcher) -> Verdict:
    letter = infer_choice(row[PREDICTION], list_options(row), matcher)
    # Exact matching takes an answer that no rule reads for 'Z', which is wrong.
    return Verdict(row["index"], letter or None, letter == row.get("answer"))


def _group_splits(rows: Sequence[Values]) -> dict[str, list[int]]:
    splits = group_rows(rows, "split")
    without = [number for number, row in enumerate(rows) if row.get("split") is None]
    return {**splits, NO_SPLIT: without} if without else splits


def _report(
    rows: Sequence[Values], verdicts: Sequence[Verdict], read: Sequence[Verdict], notes: list[str]
) -> Rating:
    """Returns the rating of verdicts, one a row; `read` are those of all answers."""
    hits = [verdict.correct for verdict in verdicts]
    rating = Rating(verdicts=list(read), notes=notes)
    for split, members in _group_splits(rows).items():
        line: dict[str, Any] = {"split": split}
        groups = {OVERALL: members}
        # In the harness's order: a category of the same name replaces an ability.
        for column in ("l2-category", "category"):
            if has_column(rows, column):
                groups |= {
                    ABBREVIATIONS.get(name, name): sorted(set(numbers) & set(members))
                    for name, numbers in group_rows(rows, column).items()
                }
        for name, numbers in groups.items():
            line[name] = average([hits[n] for n in numbers])
            rating.rates[f"{split}/{name}"] = rate_hits([hits[n] for n in numbers])
        rating.table.append(line)
    rating.units = make_units(rows, [{"accuracy": float(hit)} for hit in hits])
    return rating
