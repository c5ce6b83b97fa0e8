"""Rates yes/no questions as VLMEvalKit does: POPE, MME, HallusionBench and others.

Source: VLMEvalKit `vlmeval/dataset/utils/yorn.py`, with exact matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.evaluation.matching.yes_no import UNKNOWN, YES, extract_yes_no
from corl_jax.evaluation.tsv.rating import (
    OVERALL,
    PER_CENT,
    Rating,
    RatingOptions,
    Verdict,
    average,
    describe_missing_answers,
    group_rows,
    has_column,
    make_units,
    rate_hits,
    score_strata,
)
from corl_jax.evaluation.tsv.table import PREDICTION, Values
from corl_jax.evaluation.units import Unit

PERCEPTION = (
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position",
    "posters", "scene",
)  # fmt: skip
REASONING = (
    "code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation",
)  # fmt: skip
MME_SUMS = {"perception": PERCEPTION, "reasoning": REASONING}
OVERALL_F1 = f"{OVERALL}/F1"
"""The name of POPE's official number among the scores, in per cent."""
HALLUSION_PARTS = {"set": 3, "figure": 4, "question": 5}
"""Places in an index such as VD_chart_easy_0_1_2, split at underscores."""


def rate_yes_no(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates the share of right answers in all, and in each category, in per cent."""
    del options  # matchers are of choices
    rating, hits = _start(rows)
    line: dict[str, Any] = {}
    for name, numbers in _list_groups(rows).items():
        line[name] = PER_CENT * average([hits[n] for n in numbers])
        rating.rates[name] = rate_hits([hits[n] for n in numbers])
    rating.table.append(line)
    return rating


def rate_pope(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates POPE: `Overall` is F1 in per cent, over rows that count once for each category."""
    del options
    rating, hits = _start(rows)
    truths = [row.get("answer") == YES for row in rows]
    answers = [verdict.extracted == YES for verdict in rating.verdicts]  # unknown counts as no
    categories = [_split_categories(row.get("category")) for row in rows]
    # [rows, 4]: true positives, false positives, false negatives, right answers
    counts = np.array(
        [
            [truth and answer, answer and not truth, truth and not answer, hit]
            for truth, answer, hit in zip(truths, answers, hits, strict=True)
        ],
        float,
    )
    # A row stands in the table of all rows once for each of its categories.
    copies = np.array([max(len(names), 1) for names in categories], float)
    names = sorted({name for names in categories for name in names})
    groups = {OVERALL: copies} | {
        name: np.array([float(names.count(name)) for names in categories]) for name in names
    }
    for name, weights in groups.items():
        numbers = np.flatnonzero(weights)
        # [units, 5]: the counts of a row, and how often it stands there
        units = np.column_stack([counts, np.ones(len(rows))]) * weights[:, None]
        total = units[numbers].sum(axis=0)
        precision, recall, f1 = (float(x) for x in compute_f1(total[None, :3])[:, 0])
        accuracy = total[3] / total[4]
        rating.table.append(
            {"split": name, OVERALL: PER_CENT * f1, "acc": PER_CENT * accuracy,
             "precision": PER_CENT * precision, "recall": PER_CENT * recall}
        )  # fmt: skip
        rating.scores[f"{name}/F1"] = score_strata(
            PER_CENT * f1, [units[numbers, :3]], _resample_f1
        )
        # A row of several categories counts more than once in all, so no rate of its own rows.
        if name != OVERALL:
            rating.rates[f"{name}/acc"] = rate_hits([hits[n] for n in numbers])
            continue
        rating.scores[f"{name}/acc"] = score_strata(
            PER_CENT * accuracy, [units[numbers, 3:]], _resample_accuracy
        )
    return rating


def compute_f1(counts: np.ndarray) -> np.ndarray:
    """Returns precision, recall and F1 [3, N] of counts [N, 3]; 0 where nothing is counted.

    The counts are true positives, false positives and false negatives.
    """
    hits, false_positives, false_negatives = counts.T
    precision = _divide(hits, hits + false_positives)
    recall = _divide(hits, hits + false_negatives)
    return np.stack([precision, recall, _divide(2 * precision * recall, precision + recall)])


def rate_mme(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates MME: accuracy plus accuracy over images with both answers right, and their sums."""
    del options
    rating, hits = _start(rows)
    rating.units = []
    strata: dict[str, np.ndarray] = {}
    for category, members in _group_mme_images(rows).items():
        images = {image: [hits[n] for n in numbers] for image, numbers in members.items()}
        pairs = [answers[:2] for answers in images.values()]
        # [images, 3]: right answers, answers, both right
        strata[category] = np.array(
            [
                [sum(answers), len(answers), all(pair)]
                for answers, pair in zip(images.values(), pairs, strict=True)
            ],
            float,
        )
        rating.units += [
            Unit(f"{category}/{image}", category,
                 {"accuracy": average(answers), "accuracy_plus": float(all(answers[:2]))})
            for image, answers in images.items()
        ]  # fmt: skip
    line = _report_mme_sums(rating, strata)
    for category, units in strata.items():
        line[category] = _score_mme(rating, category, [units])
    rating.table.append(line)
    return rating


def find_mme_problems(rows: Sequence[Values]) -> list[str]:
    """Lists the images with less than two questions, for which MME has no score."""
    return [
        f"MME: image {image} of category {category} has one question; expected two for each image; "
        "evaluate all rows"
        for category, images in _group_mme_images(rows).items()
        for image, numbers in images.items()
        if len(numbers) < 2
    ]


def find_hallusion_problems(rows: Sequence[Values]) -> list[str]:
    """Lists the indices that do not name set, figure and question."""
    return [
        f"HallusionBench: index {row['index']} has too few parts; expected six, as in "
        "VD_chart_easy_0_1_2"
        for row in rows
        if len(str(row["index"]).split("_")) <= max(HALLUSION_PARTS.values())
    ]


def rate_hallusion(rows: Sequence[Values], options: RatingOptions) -> Rating:
    """Rates HallusionBench: answers, figures and questions of which all answers are right."""
    del options
    rating, hits = _start(rows)
    # One after the other, as the harness: categories, then abilities of the same rows.
    groups: list[tuple[str, Sequence[int]]] = [(OVERALL, range(len(rows)))]
    for column in ("category", "l2-category"):
        groups += group_rows(rows, column).items()
    for name, numbers in groups:
        line: dict[str, Any] = {"split": name}
        for metric, part in (("aAcc", None), ("fAcc", "figure"), ("qAcc", "question")):
            verdicts = _group_hallusion(rows, hits, numbers, part)
            line[metric] = PER_CENT * average(verdicts)
            rating.rates[f"{name}/{metric}"] = rate_hits(verdicts)
        rating.table.append(line)
    return rating


def _start(rows: Sequence[Values]) -> tuple[Rating, list[bool]]:
    """Reads all answers; returns a rating without scores, and whether each answer is right."""
    verdicts = []
    for row in rows:
        extracted = extract_yes_no(row[PREDICTION])
        known = None if extracted == UNKNOWN else extracted
        verdicts.append(Verdict(row["index"], known, row.get("answer") == extracted))
    hits = [verdict.correct for verdict in verdicts]
    rating = Rating(verdicts=verdicts, notes=describe_missing_answers(rows))
    rating.units = make_units(rows, [{"accuracy": float(hit)} for hit in hits])
    return rating, hits


def _list_groups(rows: Sequence[Values]) -> dict[str, Sequence[int]]:
    groups: dict[str, Sequence[int]] = {OVERALL: range(len(rows))}
    for column in ("category", "l2-category"):
        if has_column(rows, column):
            groups |= group_rows(rows, column)
    return groups


def _split_categories(value: Any) -> list[str]:
    return [] if value is None else str(value).split(",")


def _group_mme_images(rows: Sequence[Values]) -> dict[str, dict[str, list[int]]]:
    """Returns category -> image -> numbers of its rows."""
    groups: dict[str, dict[str, list[int]]] = {}
    for category, numbers in group_rows(rows, "category").items():
        images = groups.setdefault(category, {})
        for number in numbers:
            images.setdefault(str(rows[number].get("image_path")), []).append(number)
    return groups


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.divide(x, y, out=np.zeros_like(x, dtype=float), where=y != 0)


def _resample_f1(strata: Sequence[np.ndarray]) -> np.ndarray:
    (units,) = strata  # [draws, units, 3]: true positives, false positives, false negatives
    return PER_CENT * compute_f1(units.sum(axis=1))[2]


def _resample_accuracy(strata: Sequence[np.ndarray]) -> np.ndarray:
    (units,) = strata  # [draws, units, 2]: right answers, answers
    right, answers = units.sum(axis=1).T
    return PER_CENT * right / answers


def _sum_mme(strata: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum over categories [draws, images, 3] of accuracy and accuracy+, in per cent."""
    return PER_CENT * sum(
        (
            units[..., 0].sum(axis=1) / units[..., 1].sum(axis=1) + units[..., 2].mean(axis=1)
            for units in strata
        ),
        start=np.zeros(1),
    )


def _score_mme(rating: Rating, name: str, strata: Sequence[np.ndarray]) -> float:
    value = float(_sum_mme([units[None] for units in strata])[0])
    rating.scores[name] = score_strata(value, strata, _sum_mme)
    return value


def _report_mme_sums(rating: Rating, strata: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Adds perception and reasoning; a sum with missing categories is left out, with a note."""
    line: dict[str, Any] = {}
    for name, categories in MME_SUMS.items():
        missing = [category for category in categories if category not in strata]
        if missing:
            rating.notes.append(f"{name}: not summed, without categories {', '.join(missing)}")
        else:
            line[name] = _score_mme(rating, name, [strata[category] for category in categories])
    return line


def _group_hallusion(
    rows: Sequence[Values], hits: Sequence[bool], numbers: Sequence[int], part: str | None
) -> list[bool]:
    """Returns, for each answer or group of answers, whether all are right."""
    if part is None:
        return [hits[number] for number in numbers]
    groups: dict[str, list[bool]] = {}
    for number in numbers:
        pieces = str(rows[number]["index"]).split("_")
        key = (
            f"{rows[number].get('l2-category')}_{pieces[HALLUSION_PARTS['set']]}_"
            f"{pieces[HALLUSION_PARTS[part]]}"
        )
        groups.setdefault(key, []).append(hits[number])
    return [all(group) for group in groups.values()]
