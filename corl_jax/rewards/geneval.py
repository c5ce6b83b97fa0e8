"""Scores images by GenEval's rules, with the detector and the CLIP in process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from corl_jax.data.geneval_demands import CLASSES, parse_demand
from corl_jax.errors import Problems
from corl_jax.rewards.samples import Context, Samples

Score = Literal["dense", "strict"]


def score_geneval(samples: Samples, context: Context, *, score: Score = "dense") -> np.ndarray:
    """Returns GenEval's score of each image, in [0, 1]; NaN without a demand in `geneval`.

    `strict` is the official verdict: 1 if the image meets the whole demand, else 0. `dense` is the
    mean over the conditions of the demand (see `evaluation.geneval.dense`).

    Raises:
        InputError: a demand that cannot be judged.
    """
    # Not above: evaluation imports the rewards, so a module of both would be imported twice.
    from corl_jax.evaluation.geneval.colors import make_crop_classifier
    from corl_jax.evaluation.geneval.dense import score_image
    from corl_jax.evaluation.geneval.detector import make_detector
    from corl_jax.evaluation.geneval.scoring import detect_objects

    demands, problems = [], Problems()
    for row, value in enumerate(samples.column("geneval")):
        with problems.collect(f"row {row}: geneval: "):
            demands.append(None if value is None else parse_demand(value))
    problems.raise_any()
    # An image without a demand is detected too, so that the number of images stays the same.
    judged = [demand or {"tag": "", "include": []} for demand in demands]
    images = [*samples.require_images()]
    with context.network("mask2former") as network, context.network("clip_l14") as clip:
        detector, classify_crops = make_detector(network), make_crop_classifier(clip)
        detections = detect_objects(images, judged, detector, classify_crops)
    scores = [
        float("nan") if demand is None else getattr(score_image(demand, objects), score)
        for demand, objects in zip(demands, detections, strict=True)
    ]
    return np.array(scores, np.float32)


def find_detector_problems(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Returns a problem if the detector does not know GenEval's classes (see `RewardRow`)."""
    known = sizes["mask2former"].num_classes if "mask2former" in sizes else len(CLASSES)
    if known >= len(CLASSES):
        return []
    return [
        f"networks.mask2former knows {known} classes; expected COCO's {len(CLASSES)}, as GenEval's "
        "detector does"
    ]
