"""Spatial relations of two boxes (x0, y0, x1, y1), in pixels, y downwards, as GenEval defines them.

Source: GenEval, evaluation/evaluate_images.py, `compute_iou` and `relative_position`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
POSITION_THRESHOLD = 0.1  # an offset below this share of the summed sides does not count
MIN_OFFSET = 1e-3  # pixels; with both reduced offsets below it there is no relation
MIN_SHARE = 0.5  # of the distance of the centres


def compute_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Computes the intersection over union of two boxes whose last pixel is inside."""
    intersection = _compute_area(
        (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    )
    union = _compute_area(a) + _compute_area(b) - intersection
    return intersection / union if union else 0.0


def find_relations(
    a: Sequence[float], b: Sequence[float], threshold: float = POSITION_THRESHOLD
) -> list[str]:
    """Returns the relations of box a to box b: none, one, or two on a diagonal.

    The offset of the centres is reduced by `threshold` times the summed sides on each axis, and
    divided by the norm of the offset before this reduction.
    """
    corners = np.array([a[:4], b[:4]], np.float64).reshape(2, 2, 2)  # [box, corner, axis]
    centers = corners.mean(axis=1)
    sides = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    reduced = np.maximum(np.abs(offset) - threshold * sides.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(reduced) < MIN_OFFSET):
        return []
    x, y = reduced / np.linalg.norm(offset)
    conditions = (x < -MIN_SHARE, x > MIN_SHARE, y < -MIN_SHARE, y > MIN_SHARE)
    return [name for name, holds in zip(RELATIONS, conditions, strict=True) if holds]


def _compute_area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
