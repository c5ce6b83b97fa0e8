"""GenEval's demands on an image: their classes, their colours, and what can be wrong with one.

A demand is a line of evaluation_metadata.jsonl: `tag`, `prompt`, `include` and perhaps `exclude`.

Source: GenEval, evaluation/object_names.txt, evaluation/evaluate_images.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from corl_jax.data.drawn_world.scene import RELATIONS
from corl_jax.errors import InputError
from corl_jax.nearest import suggest_name

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The classes of COCO in the detector's order; GenEval says computer mouse, tv remote and computer
keyboard where COCO says mouse, remote and keyboard."""
COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)  # fmt: skip
MAX_TEXT = 200  # characters of a value in a message


def parse_demand(value: Any) -> dict[str, Any]:
    """Returns a demand, given as an object or as JSON.

    Raises: InputError listing what the rules or the detector cannot judge.
    """
    try:
        demand = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"found {value[:MAX_TEXT]!r}, which is not JSON ({error})") from error
    if not isinstance(demand, dict):
        raise InputError(
            f"found {str(demand)[:MAX_TEXT]!r}; expected a line of GenEval's "
            "evaluation_metadata.jsonl: {tag, prompt, include: [{class, count, ..}, ..]}"
        )
    demand = {
        key: _restore_entries(entries) for key, entries in demand.items() if entries is not None
    }
    problems = [*find_metadata_problems(demand)] or [*_find_unknown_names(demand)]
    if not problems and not demand.get("include") and not demand.get("exclude"):
        problems = ["metadata: demands nothing; expected entries in include or exclude"]
    if problems:
        raise InputError(problems)
    return demand


def _restore_entries(entries: Any) -> Any:
    """Undoes what a table with columns does to the entries of a list."""
    # {"class": "dog", "count": 2.0, "color": None} -> {"class": "dog", "count": 2}
    if not isinstance(entries, list):
        return entries
    out = []
    for entry in entries:
        if isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if value is not None}
            count = entry.get("count")
            if isinstance(count, float) and count.is_integer():
                entry["count"] = int(count)
        out.append(entry)
    return out


def find_metadata_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the form of a demand."""
    for key in ("tag", "prompt"):
        if not isinstance(metadata.get(key), str):
            yield f"metadata: {key} is {metadata.get(key)!r}; expected a text"
    for key in ("include", "exclude"):
        entries = metadata.get(key, [])
        if not isinstance(entries, list):
            yield f"metadata: {key} is {entries!r}; expected a list of objects"
            continue
        for place, entry in enumerate(entries):
            for problem in _find_entry_problems(entry, place, may_relate=key == "include"):
                yield f"metadata: {key}[{place}]: {problem}"


def _find_entry_problems(entry: Any, place: int, *, may_relate: bool) -> Iterator[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        yield f'found {entry!r}; expected {{"class": TEXT, "count": NUMBER}}'
        return
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        yield f"count is {count!r}; expected a number of at least 1"
    if "color" in entry and not isinstance(entry["color"], str):
        yield f"color is {entry['color']!r}; expected a text"
    if "position" not in entry or not may_relate:
        return
    position = entry["position"]
    is_pair = isinstance(position, list | tuple) and len(position) == 2
    if not is_pair or position[0] not in RELATIONS or position[1] not in range(place):
        yield (
            f"position is {position!r}; expected [RELATION, NUMBER] with one of "
            f"{', '.join(RELATIONS)} and the number of an earlier entry"
        )


def _find_unknown_names(demand: Mapping[str, Any]) -> Iterator[str]:
    """Yields a problem for each class that the detector and each colour that CLIP is not asked."""
    for key in ("include", "exclude"):
        for place, entry in enumerate(demand.get(key, ())):
            if entry["class"] not in CLASSES:
                yield (
                    f"metadata: {key}[{place}]: class is {entry['class']!r}, which the detector "
                    f"does not know; {suggest_name(entry['class'], CLASSES)}"
                )
            if entry.get("color", COLORS[0]) not in COLORS:
                yield (
                    f"metadata: {key}[{place}]: color is {entry['color']!r}; expected one of "
                    f"{', '.join(COLORS)}"
                )
