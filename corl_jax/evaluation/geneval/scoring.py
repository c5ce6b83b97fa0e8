"""Scores images by GenEval's rules in process: detects objects, names their colours, judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.colors import ClassifyCrops, crop_object
from corl_jax.evaluation.geneval.detections import Detection
from corl_jax.evaluation.geneval.detector import Detector, Picture
from corl_jax.evaluation.geneval.rules import (
    GENEVAL_RULES,
    Rules,
    Verdict,
    judge_image,
    keep_detections,
)


def score_geneval_images(
    images: Sequence[Picture],
    metadata: Sequence[Mapping[str, Any]],
    detector: Detector,
    color_classifier: ClassifyCrops | None,
    rules: Rules = GENEVAL_RULES,
) -> list[Verdict]:
    """Judges images by their demands, which are rows of GenEval's metadata.

    `color_classifier` may be None if no demand has a colour.

    Raises: InputError if a colour is demanded without a classifier.
    """
    detections = detect_objects(images, metadata, detector, color_classifier, rules)
    return [
        judge_image(demand, objects, rules=rules)
        for demand, objects in zip(metadata, detections, strict=True)
    ]


def detect_objects(
    images: Sequence[Picture],
    metadata: Sequence[Mapping[str, Any]],
    detector: Detector,
    color_classifier: ClassifyCrops | None,
    rules: Rules = GENEVAL_RULES,
) -> list[dict[str, list[Detection]]]:
    """Returns the objects of each image by class; those whose colour is demanded have one.

    All crops go through the classifier together.

    Raises: InputError if a colour is demanded without a classifier.
    """
    detections = detector.detect(images)
    places: list[tuple[int, str, int]] = []  # image, class and number of each crop
    crops, names = [], []
    for number, (image, demand) in enumerate(zip(images, metadata, strict=True)):
        for name, count in count_colored(demand).items():
            boxes = detections[number].get(name, [])
            chosen = keep_detections({name: boxes}, demand["tag"], rules).get(name, [])[:count]
            picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            for box in chosen:
                # By identity: two boxes may be equal, and comparing them would compare masks.
                index = next(i for i, other in enumerate(boxes) if other is box)
                places.append((number, name, index))
                crops.append(crop_object(picture, box))
                names.append(name)
    if crops and color_classifier is None:
        raise InputError("a demand has a colour, but there is no CLIP to name colours")
    colors = color_classifier(crops, names) if color_classifier is not None else []
    for (number, name, index), color in zip(places, colors, strict=True):
        boxes = detections[number][name]
        boxes[index] = dataclasses.replace(boxes[index], color=color)
    return detections


def count_colored(demand: Mapping[str, Any]) -> dict[str, int]:
    """Returns class -> the most objects of it whose colour is demanded."""
    counts: dict[str, int] = {}
    for entry in demand.get("include", ()):
        if "color" in entry:
            counts[entry["class"]] = max(entry["count"], counts.get(entry["class"], 0))
    return counts
