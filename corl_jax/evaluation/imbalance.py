"""Measures how far drawing and answering of one model lie apart, by category.

    U|G        share of wrong answers among own images that are right
    G|U        share of wrong drawings among prompts whose foreign image was answered right
    imbalance  |accuracy of drawing - accuracy of answering|

The paper's formula could not be read (showlab UniRL, arXiv 2505.23380); these are our definitions.
The accuracy of answering is that on foreign images, because own images are of the model's own
making. Without foreign images it is that on own images that are right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.units import Unit

MEAN = "mean"
"""Name of the row that averages all categories, each with the same weight."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One image of a prompt with the verdicts about it."""

    prompt: str  # name of the prompt, for images of the same prompt
    category: str
    drawn: bool | None  # the own image shows what the prompt demands; None if nobody judged it
    answered: bool | None = None  # the question about the own image; None if it was not asked
    foreign_answered: bool | None = None  # the question about an image of another source


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; NaN with the interval [0, 1] if nothing was tried."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Imbalance:
    """The measures of a category, or their mean over categories."""

    drawing: Rate | Interval
    answering: Rate | Interval
    wrong_answers: Rate | Interval  # U|G
    wrong_drawings: Rate | Interval  # G|U
    gap: Interval  # |drawing - answering|
    mean_wrong: Interval  # mean of U|G and G|U; of U|G alone without foreign images

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Returns every measure as {mean, low, high} and n where it is a rate; NaN as None."""
        values = {}
        for field in dataclasses.fields(self):
            measure = dataclasses.asdict(getattr(self, field.name))
            measure["mean"] = None if math.isnan(measure["mean"]) else measure["mean"]
            values[field.name] = measure
        return values


def measure_imbalance(trials: Iterable[Trial]) -> dict[str, Imbalance]:
    """Returns category -> measures, and their unweighted mean over categories under MEAN."""
    by_category: dict[str, list[Trial]] = {}
    for trial in trials:
        by_category.setdefault(trial.category, []).append(trial)
    measured = {name: _measure_category(rows) for name, rows in by_category.items()}
    if measured:
        measured[MEAN] = _average_categories(list(measured.values()))
    return measured


def _measure_category(trials: Sequence[Trial]) -> Imbalance:
    own_verdicts = [t.answered for t in trials if t.drawn and t.answered is not None]
    foreign = [t for t in trials if t.foreign_answered is not None]
    understood = [t for t in foreign if t.foreign_answered]
    drawn = [t.drawn for t in trials if t.drawn is not None]
    drawing = Rate.of(sum(drawn), len(drawn))
    wrong_answers = Rate.of(own_verdicts.count(False), len(own_verdicts))
    tried = [t.drawn for t in understood if t.drawn is not None]
    wrong_drawings = Rate.of(tried.count(False), len(tried))
    answering = Rate.of(own_verdicts.count(True), len(own_verdicts))
    wrong_shares = [wrong_answers]
    if foreign:
        answering = Rate.of(len(understood), len(foreign))
        wrong_shares.append(wrong_drawings)
    return Imbalance(
        drawing, answering, wrong_answers, wrong_drawings,
        subtract_rates(drawing, answering), average_rates(wrong_shares),
    )  # fmt: skip


def _average_categories(rows: Sequence[Imbalance]) -> Imbalance:
    names = [field.name for field in dataclasses.fields(Imbalance)]
    return Imbalance(*(average_rates([getattr(row, name) for row in rows]) for name in names))


def subtract_rates(first: Rate | Interval, second: Rate | Interval) -> Interval:
    """Returns the absolute difference of two rates with its interval.

    The intervals of the rates are joined as those of independent estimates, which makes the
    result wider, never narrower, for rates that rise together.
    Source: Newcombe 1998, Statistics in Medicine 17:873, method 10.
    """
    difference = first.mean - second.mean
    if math.isnan(difference):
        return Interval(math.nan, 0.0, 1.0)
    low = difference - math.hypot(first.mean - first.low, second.high - second.mean)
    high = difference + math.hypot(first.high - first.mean, second.mean - second.low)
    # Of [-0.1, 0.3] the absolute values are [0, 0.3].
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return Interval(abs(difference), nearest, min(max(abs(low), abs(high)), 1.0))


def average_rates(rates: Sequence[Rate | Interval]) -> Interval:
    """Returns the mean of the rates that have a value, with its interval; see `subtract_rates`.

    Source: Zou and Donner 2008, Statistics in Medicine 27:1693.
    """
    known = [rate for rate in rates if not math.isnan(rate.mean)]
    if not known:
        return Interval(math.nan, 0.0, 1.0)
    mean = math.fsum(rate.mean for rate in known) / len(known)
    below = math.hypot(*(rate.mean - rate.low for rate in known)) / len(known)
    above = math.hypot(*(rate.high - rate.mean for rate in known)) / len(known)
    return Interval(mean, max(mean - below, 0.0), min(mean + above, 1.0))


def collect_units(trials: Iterable[Trial]) -> list[Unit]:
    """Returns a unit for each prompt, with the means over its images, for `scores.jsonl`.

    `misread` is the share of images that are right and whose question was answered wrongly.
    """
    by_prompt: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        by_prompt.setdefault((trial.prompt, trial.category), []).append(trial)
    return [
        Unit(prompt, category, _average_verdicts(rows))
        for (prompt, category), rows in by_prompt.items()
    ]


def _average_verdicts(trials: Sequence[Trial]) -> Mapping[str, float]:
    verdicts = {
        "drawn": [t.drawn for t in trials if t.drawn is not None],
        "answered": [t.answered for t in trials if t.answered is not None],
        # Not a share of right images alone: a prompt without one would lack the metric, and two
        # models could not be compared in pairs.
        "misread": [
            bool(t.drawn) and not t.answered
            for t in trials
            if t.drawn is False or None not in (t.drawn, t.answered)
        ],
        "foreign_answered": [t.foreign_answered for t in trials if t.foreign_answered is not None],
    }
    return {name: sum(values) / len(values) for name, values in verdicts.items() if values}


def format_imbalance(measured: Mapping[str, Imbalance]) -> str:
    """Returns a table for people, one line a category, in per cent."""
    width = max(map(len, [*measured, "category"]))
    heads = ("drawing", "answering", "U|G", "G|U", "imbalance", "mean wrong")
    lines = [f"{'category':{width}} " + " ".join(f"{head:>21}" for head in heads)]
    for name, row in measured.items():
        cells = [getattr(row, field.name) for field in dataclasses.fields(row)]
        lines.append(f"{name:{width}} " + " ".join(map(_format_cell, cells)))
    return "\n".join(lines)


def _format_cell(rate: Rate | Interval) -> str:
    if math.isnan(rate.mean):
        return f"{'-':>21}"
    interval = f"({100 * rate.low:.1f} .. {100 * rate.high:.1f})"
    return f"{100 * rate.mean:5.1f} {interval:>15}"
