"""Detected objects, and the files that hold them.

A file of detections is JSON lines, a line for each image:

    {"filename": "00000/samples/0000.png", "metadata": {"tag": .., "prompt": .., "include": [..]},
     "detections": [{"class": "dog", "score": 0.97, "box": [x0, y0, x1, y1],
                     "mask": .., "color": "brown"}, ..]}

The keys of `metadata` may also stand in the line itself. `mask` and `color` may be left out; for
masks see `masks.decode_mask`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.data.geneval_demands import find_metadata_problems
from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.geneval.masks import decode_mask
from corl_jax.input_files import read_text

METADATA_KEYS = ("tag", "prompt", "include", "exclude")


@dataclasses.dataclass(frozen=True)
class Detection:
    """A detected object of one class."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float
    color: str | None = None
    mask: np.ndarray | None = None  # bool [H, W]


@dataclasses.dataclass(frozen=True)
class ImageDetections:
    """The objects in an image, and the demand on it."""

    filename: str
    metadata: dict[str, Any]
    detections: dict[str, list[Detection]]  # by class, in the order of the file


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads the JSON objects of a file with their line numbers.

    Raises: InputError listing the lines that are none, or for a file without lines.
    """
    problems, rows = Problems(), []
    # Not splitlines(): it also splits at characters such as U+2028, which JSON strings may have.
    for number, line in enumerate(read_text(path, "JSON lines").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{path}:{number}: not JSON ({error}); expected an object a line")
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.add(f"{path}:{number}: found {type(row).__name__}; expected an object")
    if not rows and not problems:
        problems.add(f"{path}: found no lines; expected an object a line")
    problems.raise_any()
    return rows


def parse_detections(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> list[ImageDetections]:
    """Returns the images of a file, without masks. Raises: InputError listing all problems."""
    problems, images = Problems(), []
    for number, row in rows:
        with problems.collect(f"{path}:{number}: "):
            images.append(_parse_image(row))
    names: set[str] = set()
    for image in images:
        if image.filename in names:
            problems.add(f"{path}: image {image.filename} stands twice; expected each image once")
        names.add(image.filename)
    problems.raise_any()
    return images


def read_masks(row: Mapping[str, Any], name: str, folder: Path) -> list[np.ndarray | None]:
    """Returns the masks of a class in a line, in the order of `ImageDetections.detections`.

    Raises: InputError for a mask that cannot be read.
    """
    values = [item.get("mask") for item in row["detections"] if item["class"] == name]
    return [None if value is None else decode_mask(value, folder) for value in values]


def _parse_image(row: dict[str, Any]) -> ImageDetections:
    problems = Problems()
    metadata: Any = row.get("metadata")
    if isinstance(metadata, str):  # as the official results hold it
        try:
            metadata = json.loads(metadata)
        except ValueError:
            problems.add("metadata: is a text that is not JSON; expected an object")
    if metadata is None:
        metadata = {key: row[key] for key in METADATA_KEYS if key in row}
    if not isinstance(metadata, dict):
        problems.add(f"metadata: found {metadata!r}; expected an object")
    else:
        problems.add(find_metadata_problems(metadata))
    if not isinstance(row.get("filename"), str):
        problems.add(f"filename: found {row.get('filename')!r}; expected the image's path")
    detections: dict[str, list[Detection]] = {}
    items = row.get("detections")
    if not isinstance(items, list):
        problems.add(f"detections: found {items!r}; expected a list of objects")
        items = []
    for place, item in enumerate(items):
        with problems.collect(f"detections[{place}]: "):
            detections.setdefault(*_start_class(item)).append(_parse_detection(item))
    problems.raise_any()
    assert isinstance(metadata, dict)  # otherwise there was a problem
    return ImageDetections(row["filename"], metadata, detections)


def _start_class(item: Any) -> tuple[str, list[Detection]]:
    if not isinstance(item, dict) or not isinstance(item.get("class"), str):
        raise InputError(f'found {str(item)[:80]}; expected {{"class", "score", "box"}}')
    return item["class"], []


def _parse_detection(item: dict[str, Any]) -> Detection:
    box, score, color = item.get("box"), item.get("score"), item.get("color")
    problems = Problems()
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        problems.add(f"box is {box!r}; expected [x0, y0, x1, y1] in pixels")
    elif box[0] > box[2] or box[1] > box[3]:
        problems.add(f"box is {box}; expected x0 <= x1 and y0 <= y1")
    if not _is_number(score):
        problems.add(f"score is {score!r}; expected a number")
    if color is not None and not isinstance(color, str):
        problems.add(f"color is {color!r}; expected a text")
    problems.raise_any()
    x0, y0, x1, y1 = item["box"]
    return Detection((x0, y0, x1, y1), item["score"], color)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
