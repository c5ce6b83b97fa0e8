"""GenEval 2: means of a judge's scores of questions about each image, in per cent.

Soft-TIFA AM is the mean over a prompt's questions, GM their geometric mean, both averaged over
prompts. TIFA is AM of scores that are 0 or 1. VQAScore has one score for each prompt.

Source: Kamath et al. 2025 (arXiv 2512.16853); GenEval 2, evaluation.py and soft_tifa_analysis.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.scores import Score
from corl_jax.evaluation.units import Unit
from corl_jax.input_files import read_text

PROMPTS = 800
SOFT_TIFA, TIFA, VQA_SCORE = METHODS = ("soft_tifa", "tifa", "vqascore")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of geneval2_data.jsonl."""

    text: str
    atom_count: int
    skills: tuple[str, ...]  # one for each question


def read_prompts(path: Path) -> list[Prompt]:
    """Reads geneval2_data.jsonl. Raises: InputError listing lines that are not of its form."""
    problems, prompts = Problems(), []
    for number, line in enumerate(read_text(path, "geneval2_data.jsonl").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            skills = tuple(map(str, row["skills"]))
            prompts.append(Prompt(str(row["prompt"]), int(row["atom_count"]), skills))
            if len(skills) != len(row["vqa_list"]):
                problems.add(
                    f"{path}:{number}: found {len(skills)} skills for {len(row['vqa_list'])} "
                    "questions; expected one for each"
                )
            elif not skills:
                problems.add(f"{path}:{number}: has no questions; expected at least one")
        except (ValueError, KeyError, TypeError) as error:
            problems.add(
                f"{path}:{number}: {type(error).__name__} {error}; expected prompt, atom_count, "
                "vqa_list and skills, as in geneval2_data.jsonl"
            )
    if not prompts and not problems:
        problems.add(f"{path}: found no lines; expected those of geneval2_data.jsonl")
    problems.raise_any()
    return prompts


def read_score_lists(path: Path, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Reads the judge's output file: a list for each prompt of scores for each question.

    Raises: InputError if it is of another form, or does not fit the prompts.
    """
    expected = "expected the --output_file of GenEval 2's evaluation.py, a list of lists of numbers"
    text = read_text(path, "JSON")
    try:
        lists = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(lists, list) or not all(isinstance(scores, list) for scores in lists):
        raise InputError(f"{path}: found {type(lists).__name__}; {expected}")
    if len(lists) != len(prompts):
        raise InputError(
            f"{path}: has {len(lists)} lists, the data file {len(prompts)} prompts; expected the "
            "same, in the same order"
        )
    problems = Problems()
    is_vqa_score = all(len(scores) == 1 for scores in lists)
    for place, (scores, prompt) in enumerate(zip(lists, prompts, strict=True)):
        if not is_vqa_score and len(scores) != len(prompt.skills):
            problems.add(
                f"{path}: list {place} has {len(scores)} scores, its prompt {len(prompt.skills)} "
                f"questions ({prompt.text[:60]!r}); use the data file of the evaluation"
            )
        if not all(_is_score(score) for score in scores):
            problems.add(f"{path}: list {place} is {scores}; expected numbers of at least 0")
    problems.raise_any()
    return lists


def guess_method(lists: Sequence[Sequence[float]], prompts: Sequence[Prompt]) -> str:
    """Returns which of METHODS wrote the scores."""
    has_single_scores = all(len(scores) == 1 for scores in lists)
    if has_single_scores and any(len(prompt.skills) > 1 for prompt in prompts):
        return VQA_SCORE
    return TIFA if all(score in (0, 1) for scores in lists for score in scores) else SOFT_TIFA


def average_scores(scores: Sequence[float]) -> float:
    """Returns the mean of a prompt's scores."""
    return sum(scores) / len(scores)


def geometric_mean(scores: Sequence[float]) -> float:
    """Returns the geometric mean of a prompt's scores; 0 if one is 0."""
    if min(scores) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, scores)) / len(scores))


def make_units(
    lists: Sequence[Sequence[float]], prompts: Sequence[Prompt], method: str
) -> list[Unit]:
    """Returns a unit for each prompt, with the means of its questions by skill, in per cent."""
    units = []
    for number, (scores, prompt) in enumerate(zip(lists, prompts, strict=True)):
        mean = 100 * average_scores(scores)
        if method == SOFT_TIFA:
            values = {"soft_tifa_gm": 100 * geometric_mean(scores), "soft_tifa_am": mean}
        else:
            values = {method: mean}
        if method != VQA_SCORE:
            for skill in dict.fromkeys(prompt.skills):
                chosen = [s for s, name in zip(scores, prompt.skills, strict=True) if name == skill]
                values[f"skill/{skill}"] = 100 * average_scores(chosen)
        # With the number, because nothing forbids two equal prompts.
        name = f"{number:03}: {prompt.text}"
        units.append(Unit(name, f"{prompt.atom_count} atoms", values))
    return units


def summarize_lists(
    lists: Sequence[Sequence[float]], prompts: Sequence[Prompt], method: str
) -> dict[str, Score]:
    """Returns the totals, the means by skill and by number of atoms, in per cent.

    As in the official analysis, a skill's score is the mean over all its questions, and that of a
    number of atoms is GM (the mean for the methods without GM). Intervals are over prompts.
    """
    totals = (geometric_mean, average_scores) if method == SOFT_TIFA else (average_scores,)
    names = ("soft_tifa_gm", "soft_tifa_am") if method == SOFT_TIFA else (method,)
    scores = {
        name: Score.of([np.array([100 * mean(row) for row in lists])])
        for name, mean in zip(names, totals, strict=True)
    }
    if method != VQA_SCORE:
        for skill in dict.fromkeys(skill for prompt in prompts for skill in prompt.skills):
            scores[f"skill/{skill}"] = Score.of([_count_skill(lists, prompts, skill)], _divide_sums)
    for count in sorted({prompt.atom_count for prompt in prompts}):
        values = [
            100 * totals[0](row)
            for row, prompt in zip(lists, prompts, strict=True)
            if prompt.atom_count == count
        ]
        scores[f"atoms/{count}"] = Score.of([np.array(values)])
    return scores


def _count_skill(
    lists: Sequence[Sequence[float]], prompts: Sequence[Prompt], skill: str
) -> np.ndarray:
    """Returns the sum of scores and the number of questions of a skill, [prompts with it, 2]."""
    rows = []
    for scores, prompt in zip(lists, prompts, strict=True):
        chosen = [s for s, name in zip(scores, prompt.skills, strict=True) if name == skill]
        if chosen:
            rows.append([100 * sum(chosen), len(chosen)])
    return np.array(rows)


def _divide_sums(strata: Sequence[np.ndarray]) -> np.ndarray:
    totals = np.concatenate(list(strata), axis=1).sum(axis=1)  # [draws, 2]
    return totals[:, 0] / totals[:, 1]


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
