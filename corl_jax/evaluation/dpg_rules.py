"""DPG-Bench: scores from a judge's answers to questions about each picture, in per cent.

A question scores 1 if its answer is exactly `yes`. In the order of the file, a question with a
parent of score 0 becomes 0. A picture's score is the mean of its questions, a prompt's that of its
pictures, and the total that of the prompts.

The official script drops the first row of the questions, so that the first prompt lacks a question
and, if others depend on it, is left out. It computes categories from the last picture alone, with
scores before parents set them to 0. Both ways of computing are here.

Source: Hu et al. 2024 (arXiv 2403.05135); ELLA, dpg_bench/compute_dpg_bench.py.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.scores import Score
from corl_jax.evaluation.units import Unit
from corl_jax.input_files import read_text

PROMPTS = 1065
YES = "yes"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
# "PATH, (0, 0, 384, 384), QUESTION, ANSWER"
DETAIL = re.compile(r"(.*?), (\(\d+, \d+, \d+, \d+\)), (.*), (.*)", re.DOTALL)

Answers = Mapping[int, str]  # of a picture, by question


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of dpg_bench.csv."""

    number: int
    text: str
    category: str  # such as "entity - whole"
    parents: tuple[int, ...]  # numbers of questions


Questions = dict[str, dict[int, Question]]  # by prompt and number, in the order of the file


def read_questions(path: Path, *, drop_first: bool = False) -> Questions:
    """Reads dpg_bench.csv. `drop_first` leaves out its first row, as the official script does.

    Raises: InputError listing rows that cannot be read.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, "dpg_bench.csv"), newline=""))
    missing_columns = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing_columns:
        raise InputError(
            f"{path}: found no column {', '.join(missing_columns)}; expected those of dpg_bench.csv"
        )
    problems, questions, previous = Problems(), {}, None
    for place, row in enumerate(reader):
        if drop_first and place == 0:
            continue
        item = row["item_id"]
        try:
            question = Question(
                int(row["proposition_id"]),
                row["question_natural_language"],
                row["tuple"].split("(")[0].strip(),
                tuple(int(parent) for parent in row["dependency"].split(",")),
            )
        except (ValueError, AttributeError) as error:
            problems.add(
                f"{path}: row {place}: {error}; expected whole numbers in proposition_id and "
                "dependency (such as `1,2`, or 0)"
            )
            continue
        # As in the original, rows of a prompt stand together: later ones replace earlier ones.
        if item != previous:
            questions[item] = {}
        questions[item][question.number] = question
        previous = item
    problems.raise_any()
    return questions


# ---- answers


def read_answers(path: Path, questions: Questions) -> dict[str, list[Answers]]:
    """Reads the answers for each picture of each prompt, in the order of the file.

    The file is the *_detail.txt that the official script writes, or JSON lines with an object
    `{"item_id": .., "answers": {NUMBER: ANSWER, ..}}` for each picture.
    Raises: InputError listing lines that cannot be read.
    """
    text = read_text(path, "answers")
    pictures: dict[str, dict[Any, dict[int, str]]] = {}
    by_text: dict[str, dict[str, list[int]]] = {}
    for name, rows in questions.items():
        for number, question in rows.items():
            by_text.setdefault(name, {}).setdefault(question.text, []).append(number)
    problems = Problems()
    for place, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        with problems.collect(f"{path}:{place}: "):
            if text.lstrip().startswith("{"):
                item, answers = _parse_json_line(line)
                key: Any = place
            else:
                item, key, answers = _parse_detail(line, by_text)
            pictures.setdefault(item, {}).setdefault(key, {}).update(answers)
    if not pictures and not problems:
        problems.add(f"{path}: found no answers; expected *_detail.txt of the official script")
    unknown_items = [item for item in pictures if item not in questions]
    if unknown_items:
        problems.add(
            f"{path}: {len(unknown_items)} prompts have no questions, such as {unknown_items[0]}; "
            "expected item_ids of the CSV file"
        )
    problems.raise_any()
    return {item: [*of_item.values()] for item, of_item in pictures.items()}


def _parse_json_line(line: str) -> tuple[str, dict[int, str]]:
    try:
        row = json.loads(line)
        return str(row["item_id"]), {int(n): str(a) for n, a in row["answers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{type(error).__name__} {error}; expected {{"item_id": TEXT, "answers": {{..}}}}'
        ) from None


def _parse_detail(
    line: str, by_text: Mapping[str, Mapping[str, Sequence[int]]]
) -> tuple[str, tuple[str, str], dict[int, str]]:
    """Returns the prompt, what tells its pictures apart, and the answer of a line.

    Questions of the same text have the same answer: the judge does not sample.
    """
    match = DETAIL.fullmatch(line.rstrip("\r"))
    if match is None:
        raise InputError(f"found {line[:80]!r}; expected PATH, (x0, y0, x1, y1), QUESTION, ANSWER")
    place, crop, text, answer = match.groups()
    item = PurePath(place).name.split(".")[0]
    numbers = by_text.get(item, {})
    if text not in numbers:
        # An answer may hold a comma: the question is then the longest known beginning.
        rest = f"{text}, {answer}"
        known = max((q for q in numbers if rest.startswith(f"{q}, ")), key=len, default=None)
        if known is None:
            raise InputError(f"{item}: the CSV file has no question {text[:80]!r} for it")
        text, answer = known, rest[len(known) + 2 :]
    return item, (place, crop), dict.fromkeys(numbers[text], answer)


# ---- scores


def score_questions(answers: Answers, questions: Mapping[int, Question]) -> dict[int, float]:
    """Returns the score of each question, 1 if its answer is exactly `yes`.

    Raises: InputError if an answer is missing.
    """
    missing_numbers = [number for number in questions if number not in answers]
    if missing_numbers:
        raise InputError(f"has no answer to question {', '.join(map(str, missing_numbers))}")
    return {number: float(answers[number] == YES) for number in questions}


def apply_parents(
    scores: Mapping[int, float], questions: Mapping[int, Question]
) -> dict[int, float]:
    """Returns the scores with 0 for each question that has a parent of score 0.

    Parents that were set to 0 count as such, so that the order of the questions matters.
    Raises: InputError if a parent is no question of the prompt.
    """
    zeroed = dict(scores)
    for number, question in questions.items():
        for parent in question.parents:
            if parent != 0 and parent not in zeroed:
                raise InputError(
                    f"question {number} depends on question {parent}, which is missing"
                )
            if parent != 0 and zeroed[parent] == 0:
                zeroed[number] = 0.0
                # The original looks at no further parent, which may be missing.
                break
    return zeroed


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """The scores of a prompt's questions for each picture, before and after `apply_parents`."""

    questions: Mapping[int, Question]
    before: list[dict[int, float]]
    after: list[dict[int, float]]

    @property
    def mean(self) -> float:
        """The prompt's score, 0 to 1."""
        pictures = [sum(scores.values()) / len(scores) for scores in self.after]
        return sum(pictures) / len(pictures)


def score_prompts(
    answers: Mapping[str, Sequence[Answers]], questions: Questions
) -> tuple[dict[str, PromptScores], dict[str, str]]:
    """Returns the scores of each prompt, and the reason why for each that has none."""
    scored, failed = {}, {}
    for item, pictures in answers.items():
        rows = questions.get(item)
        if not rows:
            failed[item] = "has no questions"
            continue
        try:
            before = [score_questions(picture, rows) for picture in pictures]
            after = [apply_parents(scores, rows) for scores in before]
        except InputError as error:
            failed[item] = str(error)
            continue
        scored[item] = PromptScores(rows, before, after)
    return scored, failed


def summarize_prompts(scored: Mapping[str, PromptScores]) -> Score:
    """Returns 100 times the mean over prompts, with its interval."""
    return Score.of([np.array([100 * prompt.mean for prompt in scored.values()])])


def average_categories(
    scored: Mapping[str, PromptScores], *, as_released: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the means of the questions of broad and of detailed categories, in per cent.

    As released, only the last picture of a prompt counts, with scores before `apply_parents`;
    else all pictures, with scores after it.
    """
    broad: dict[str, list[float]] = {}
    detailed: dict[str, list[float]] = {}
    for prompt in scored.values():
        for number, question in prompt.questions.items():
            pictures = prompt.before[-1:] if as_released else prompt.after
            values = [scores[number] for scores in pictures]
            # "entity - whole" -> "entity"
            broad.setdefault(question.category.split("-")[0].strip(), []).extend(values)
            detailed.setdefault(question.category, []).extend(values)

    def average_groups(groups: Mapping[str, list[float]]) -> dict[str, float]:
        return {name: 100 * sum(groups[name]) / len(groups[name]) for name in sorted(groups)}

    return average_groups(broad), average_groups(detailed)


def make_units(scored: Mapping[str, PromptScores]) -> list[Unit]:
    """Returns a unit for each prompt; its category is the source of the prompt."""
    return [
        Unit(item, re.sub(r"[\d_]+.*", "", item) or "numbered", {"dpg": 100 * prompt.mean})
        for item, prompt in scored.items()
    ]
