"""Summarises verdicts on GenEval's images: the official numbers, with intervals over prompts.

Source: GenEval, evaluation/summary_scores.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from corl_jax.errors import Problems
from corl_jax.evaluation.scores import Score, format_scores
from corl_jax.evaluation.units import Unit

PROMPTS = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
    "color_attr": 100,
}  # fmt: skip
"""Tag -> number of prompts in evaluation_metadata.jsonl."""


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """The verdict on an image."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    metadata: str  # the demand as JSON, which tells prompts apart


@dataclasses.dataclass(frozen=True)
class TagScore:
    """The share of a tag's images that are correct."""

    hits: int
    images: int
    score: Score


@dataclasses.dataclass(frozen=True)
class Summary:
    """The official numbers. Intervals are bootstraps of prompts within tags."""

    images: int
    prompts: int
    correct_images: float
    correct_prompts: float  # with any correct image
    tags: dict[str, TagScore]
    overall: Score  # the unweighted mean over tags

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


def parse_results(rows: Sequence[tuple[int, Mapping[str, Any]]], path: Any) -> list[ImageResult]:
    """Returns the verdicts of the official results.jsonl. Raises: InputError listing problems."""
    problems, results = Problems(), []
    for number, row in rows:
        texts = {key: row.get(key) for key in ("filename", "tag", "prompt", "metadata")}
        if isinstance(texts["metadata"], dict):
            texts["metadata"] = json.dumps(texts["metadata"])
        where = f"{path}:{number}"
        problems.add(
            f"{where}: {key} is {value!r}; expected a text"
            for key, value in texts.items()
            if not isinstance(value, str)
        )
        if not isinstance(row.get("correct"), bool):
            problems.add(f"{where}: correct is {row.get('correct')!r}; expected true or false")
        values = {key: str(value) for key, value in texts.items()}
        results.append(ImageResult(**values, correct=bool(row.get("correct"))))
    problems.raise_any()
    return results


def summarize_results(results: Sequence[ImageResult]) -> Summary:
    """Computes the official numbers with their intervals."""
    strata = count_hits(results)
    tags = {}
    for tag, counts in strata.items():
        hits, images = counts.sum(axis=0)
        tags[tag] = TagScore(int(hits), int(images), Score.of([counts], average_images))
    # The official summary tells prompts apart by their demands.
    correct = {result.metadata: False for result in results}
    for result in results:
        correct[result.metadata] |= result.correct
    return Summary(
        len(results),
        len(correct),
        float(np.mean([result.correct for result in results])),
        float(np.mean([*correct.values()])),
        tags,
        Score.of([*strata.values()], average_images),
    )


def average_images(strata: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean over tags of correct images over images, of counts [draws, prompts, 2]."""
    totals = [counts.sum(axis=1) for counts in strata]
    return np.mean([total[:, 0] / total[:, 1] for total in totals], axis=0)


def count_hits(results: Iterable[ImageResult]) -> dict[str, np.ndarray]:
    """Returns tag -> correct images and images of each prompt, [prompts, 2]."""
    counts: dict[str, dict[tuple[str, str], list[int]]] = {}
    for result in results:
        prompt = (name_unit(result), result.metadata)
        pair = counts.setdefault(result.tag, {}).setdefault(prompt, [0, 0])
        pair[0] += result.correct
        pair[1] += 1
    return {tag: np.array([*prompts.values()]) for tag, prompts in counts.items()}


def name_unit(result: ImageResult) -> str:
    """Returns the number of the prompt's folder, or its text if the path has no such folder."""
    # FOLDER/00012/samples/0000.png -> 00012
    parts = PurePath(result.filename).parts
    if len(parts) >= 3 and parts[-2] == "samples" and parts[-3].isdigit():
        return parts[-3]
    return result.prompt


def make_units(results: Sequence[ImageResult]) -> list[Unit]:
    """Returns a unit for each prompt: the share of its images that are correct.

    As in the official summary, the demand tells prompts apart: further demands in one folder (or on
    one text) are units of their own.
    """
    groups: dict[str, dict[str, list[ImageResult]]] = {}
    for result in results:
        demands = groups.setdefault(name_unit(result), {})
        demands.setdefault(result.metadata, []).append(result)
    return [
        Unit(
            f"{name} ({place})" if place else name,
            group[0].tag,
            {"correct": float(np.mean([result.correct for result in group]))},
        )
        for name, demands in groups.items()
        for place, group in enumerate(demands.values())
    ]


def find_incomplete(results: Sequence[ImageResult]) -> list[str]:
    """Returns warnings for what makes the overall score another one than GenEval's."""
    warnings, numbers = [], {tag: len(counts) for tag, counts in count_hits(results).items()}
    missing_tags = [tag for tag in PROMPTS if tag not in numbers]
    if missing_tags:
        warnings.append(
            f"no images of {', '.join(missing_tags)}: the overall score is a mean over the other "
            "tags, and no GenEval score"
        )
    unknown_tags = [tag for tag in numbers if tag not in PROMPTS]
    if unknown_tags:
        warnings.append(f"{', '.join(unknown_tags)}: no tag of GenEval, but part of the overall")
    total = sum(numbers.values())
    if total != sum(PROMPTS.values()):
        warnings.append(f"{total} prompts; GenEval has {sum(PROMPTS.values())}")
    images = {int(n) for counts in count_hits(results).values() for n in counts[:, 1]}
    if len(images) > 1:
        warnings.append(
            f"between {min(images)} and {max(images)} images of a prompt; expected equal numbers, "
            "as prompts with more images weigh more"
        )
    return warnings


def format_official(summary: Summary) -> str:
    """Returns the text that the official script prints."""
    lines = [
        "Summary",
        "=======",
        f"Total images: {summary.images}",
        f"Total prompts: {summary.prompts}",
        f"% correct images: {summary.correct_images:.2%}",
        f"% correct prompts: {summary.correct_prompts:.2%}",
        "",
        "Task breakdown",
        "==============",
        *(
            f"{tag:<16} = {row.score.mean:.2%} ({row.hits} / {row.images})"
            for tag, row in summary.tags.items()
        ),
        "",
        f"Overall score (avg. over tasks): {summary.overall.mean:.5f}",
    ]
    return "\n".join(lines)


def format_intervals(summary: Summary) -> str:
    """Returns the scores with their 95% intervals, in per cent."""
    scores = {tag: tag_score.score for tag, tag_score in summary.tags.items()}
    return format_scores(
        {name: score.times(100) for name, score in (scores | {"overall": summary.overall}).items()}
    )
