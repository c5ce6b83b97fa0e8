"""Scores an image by GenEval's rules for training: strict, and with credit for parts.

The dense score is the unweighted mean over the conditions of the demand:

- each entry of `include`: the presence of its objects. It is min(n, count) / count for n boxes.
  If an entry of `exclude` sets an upper limit for the same class, each box beyond the limit costs
  1 / count, down to 0. So a counting prompt has the single condition 1 - |n - count| / count.
- each colour: the share of the `count` boxes with it; 0 if boxes are missing.
- each position: the share of pairs with the relation. It is 0 unless both entries are matched.
- each entry of `exclude` whose class is not in `include`: 1 if it holds, else 0.

An object that is there counts once, for its presence, and never for a relation that it has
without the other object. The dense score is 1 exactly if the strict score is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from corl_jax.evaluation.geneval.rules import (
    GENEVAL_RULES,
    ClassifyColors,
    Detections,
    Rules,
    Verdict,
    judge_image,
)


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """The two scores of an image, in [0, 1]."""

    strict: float  # 1 if the official verdict is correct, else 0
    dense: float
    reason: str


def score_image(
    metadata: Mapping[str, Any],
    detections: Detections,
    classify_colors: ClassifyColors | None = None,
    rules: Rules = GENEVAL_RULES,
) -> ImageScore:
    """Scores an image; the arguments and errors are those of `judge_image`."""
    verdict = judge_image(metadata, detections, classify_colors, rules)
    conditions = list_conditions(metadata, verdict)
    dense = sum(conditions) / len(conditions) if conditions else float(verdict.correct)
    return ImageScore(float(verdict.correct), dense, verdict.reason)


def list_conditions(metadata: Mapping[str, Any], verdict: Verdict) -> list[float]:
    """Returns the credit for each condition of the demand, in [0, 1]; see the module."""
    limits: dict[str, int] = {}  # class -> the smallest number of boxes that is too many
    for demand in metadata.get("exclude", ()):
        name = demand["class"]
        limits[name] = min(demand["count"], limits.get(name, demand["count"]))
    credits = []
    for entry in verdict.entries:
        name, count = entry.demand["class"], entry.demand["count"]
        number = len(verdict.counted.get(name, ()))
        excess = max(0, number - limits[name] + 1) if name in limits else 0
        credits.append(max(0.0, (min(number, count) - excess) / count))
        if "color" in entry.demand:
            colors = entry.colors or ()
            credits.append(min(1.0, list(colors).count(entry.demand["color"]) / count))
        if "position" in entry.demand:
            credits.append(entry.related / entry.pairs if entry.related else 0.0)
    demanded = {entry.demand["class"] for entry in verdict.entries}
    credits += [
        float(len(verdict.counted.get(name, ())) < limit)
        for name, limit in limits.items()
        if name not in demanded
    ]
    return credits
