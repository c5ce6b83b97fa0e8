"""Judges an image from its detected objects by GenEval's rules.

A demand (`metadata`) is a row of evaluation_metadata.jsonl: `include` lists objects that must be
there, with a count and perhaps a colour or a position, `exclude` lists objects that must not.

Source: GenEval, evaluation/evaluate_images.py, `evaluate` and `evaluate_image`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.data.geneval_demands import COLORS
from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.detections import Detection
from corl_jax.evaluation.geneval.relations import (
    POSITION_THRESHOLD,
    compute_iou,
    find_relations,
)

Detections = Mapping[str, Sequence[Detection]]  # by class name
ClassifyColors = Callable[
    [str, Sequence[Detection]], Sequence[str]
]  # (class, its boxes) -> colours

COUNTING = "counting"  # the tag with a threshold of its own


@dataclasses.dataclass(frozen=True)
class Rules:
    """The constants of the rules; the defaults are GenEval's."""

    threshold: float = 0.3  # a score must be above it
    counting_threshold: float = 0.9  # of the tag `counting`
    max_objects: int = 16  # of each class
    max_overlap: float = 1.0  # IoU from which a box is dropped for a better one; 1: none is dropped
    position_threshold: float = POSITION_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `include` after the check."""

    demand: Mapping[str, Any]
    boxes: Sequence[Detection]  # the first `count` of its class
    colors: Sequence[str] | None  # of the boxes; None if no colour is demanded or boxes are missing
    related: int | None  # pairs with the demanded relation; None if positions were not compared
    pairs: int  # that were compared
    is_matched: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of an image."""

    correct: bool
    reason: str  # a line for each demand that is not met; empty if correct
    details: dict[
        str, list[list[float]]
    ]  # class -> [x0, y0, x1, y1, score] of each box that counts
    entries: tuple[Entry, ...]
    counted: Detections


GENEVAL_RULES = Rules()


def judge_image(
    metadata: Mapping[str, Any],
    detections: Detections,
    classify_colors: ClassifyColors | None = None,
    rules: Rules = GENEVAL_RULES,
) -> Verdict:
    """Judges an image. `detections` may hold boxes of any score in any order.

    `classify_colors` names the colours of boxes of a class. Without it, the boxes' own colours
    are read.

    Raises: InputError if a colour is demanded of a box that has none.
    """
    counted = keep_detections(detections, metadata["tag"], rules)
    classify_colors = classify_colors or read_colors
    entries: list[Entry] = []
    reasons: list[str] = []
    for demand in metadata.get("include", ()):
        entry, entry_reasons = _judge_entry(demand, counted, entries, classify_colors, rules)
        entries.append(entry)
        reasons += entry_reasons
    for demand in metadata.get("exclude", ()):
        name, count = demand["class"], demand["count"]
        number = len(counted.get(name, ()))
        if number >= count:
            reasons.append(f"expected {name}<{count}, found {number}")
    details = {name: [[*box.box, box.score] for box in boxes] for name, boxes in counted.items()}
    return Verdict(not reasons, "\n".join(reasons), details, tuple(entries), counted)


def keep_detections(detections: Detections, tag: str, rules: Rules = GENEVAL_RULES) -> Detections:
    """Returns the boxes that count, by falling score; a class without any is left out.

    Boxes of equal scores come in reversed order, as in the original, which reverses a rising sort.
    The original's sort leaves this open for some numbers of boxes; here it is always so.
    """
    threshold = rules.counting_threshold if tag == COUNTING else rules.threshold
    counted = {}
    for name, boxes in detections.items():
        # The detector's scores are float32, and the original compares them as such.
        scores = np.array([box.score for box in boxes], np.float32)
        order = np.argsort(scores, kind="stable")[::-1]
        order = order[scores[order] > np.float32(threshold)][: rules.max_objects]
        chosen = _drop_overlaps([boxes[index] for index in order], rules.max_overlap)
        if chosen:
            counted[name] = chosen
    return counted


def read_colors(name: str, boxes: Sequence[Detection]) -> list[str]:
    """Returns the colours that the boxes of a class state. Raises: InputError if one has none."""
    colors = [box.color for box in boxes if box.color is not None]
    if len(colors) < len(boxes):
        raise InputError(
            f"a colour of {name} is demanded, but its boxes have no `color`; give each box a "
            "colour, or masks and a CLIP"
        )
    return colors


def _drop_overlaps(boxes: list[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap == 1:
        return boxes
    chosen: list[Detection] = []
    for box in boxes:
        if all(compute_iou(better.box, box.box) < max_overlap for better in chosen):
            chosen.append(box)
    return chosen


def _judge_entry(
    demand: Mapping[str, Any],
    counted: Detections,
    entries: Sequence[Entry],
    classify_colors: ClassifyColors,
    rules: Rules,
) -> tuple[Entry, list[str]]:
    """Judges an entry of `include` after `entries`; returns it with the reasons against it."""
    name, count = demand["class"], demand["count"]
    boxes = counted.get(name, ())[:count]
    if len(boxes) < count:
        reason = f"expected {name}>={count}, found {len(boxes)}"
        return Entry(demand, boxes, None, None, 0, False), [reason]
    reasons, colors = [], None
    if "color" in demand:
        colors = list(classify_colors(name, boxes))
        number = colors.count(demand["color"])
        if number < count:
            seen = ", ".join(f"{colors.count(c)} {c}" for c in _order_colors(colors))
            color = demand["color"]
            reasons.append(f"expected {color} {name}>={count}, found {number} {color}; and {seen}")
    related, pairs = None, 0
    if "position" in demand and not reasons:
        relation, target = demand["position"]
        if not entries[target].is_matched:
            reasons.append(f"no target for {name} to be {relation}")
        else:
            relations = [
                find_relations(a.box, b.box, rules.position_threshold)
                for a in boxes
                for b in entries[target].boxes
            ]
            wrong = [names for names in relations if relation not in names]
            related, pairs = len(relations) - len(wrong), len(relations)
            if wrong:
                # The original names the first wrong pair, its relations in the order of a set.
                seen = " and ".join(wrong[0])
                reasons.append(f"expected {name} {relation} target, found {seen} target")
    return Entry(demand, boxes, colors, related, pairs, not reasons), reasons


def _order_colors(colors: Sequence[str]) -> list[str]:
    """Returns each colour once: GenEval's in their order, then others as they come."""
    others = [color for color in dict.fromkeys(colors) if color not in COLORS]
    return [color for color in COLORS if color in colors] + others
