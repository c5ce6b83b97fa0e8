"""Measures how far two judges agree on the same images: Cohen's kappa for each tag.

Source: Cohen 1960, A coefficient of agreement for nominal scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.summary import ImageResult

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two judges agree on the images of a tag."""

    images: int
    equal: float  # share of images with the same verdict
    kappa: float | None  # None if both always give the same one verdict: chance explains all

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


def measure_agreement(
    results: Sequence[ImageResult], others: Sequence[ImageResult]
) -> dict[str, Agreement]:
    """Returns tag -> agreement, and that of all images.

    Raises: InputError if no image stands in both, or tags differ.
    """
    known = {name_image(other.filename): other for other in others}
    verdicts: dict[str, list[tuple[bool, bool]]] = {}
    for result in results:
        other = known.get(name_image(result.filename))
        if other is None:
            continue
        if other.tag != result.tag:
            raise InputError(
                f"--against: {other.filename} has the tag {other.tag}, but here it is "
                f"{result.tag}; expected results of the same prompts"
            )
        for tag in (result.tag, ALL):
            verdicts.setdefault(tag, []).append((result.correct, other.correct))
    if not verdicts:
        raise InputError(
            "--against: has none of these images; expected paths that end as "
            f"{'/'.join(name_image(results[0].filename))}"
        )
    whole = verdicts.pop(ALL)
    return {tag: compare_verdicts(np.array(pairs)) for tag, pairs in verdicts.items()} | {
        ALL: compare_verdicts(np.array(whole))
    }


def name_image(filename: str) -> tuple[str, ...]:
    """Returns the folder's and the image's numbers, which harnesses write with other zeros."""
    # IMAGES/00012/samples/0000.png -> ("12", "0"), as IMAGES/12/samples/00000.png
    path = PurePath(filename)
    parts = (path.parts[-3] if len(path.parts) >= 3 else "", path.stem)
    return tuple(str(int(part)) if part.isdigit() else part for part in parts)


def compare_verdicts(verdicts: np.ndarray) -> Agreement:
    """Computes the agreement of two judges' verdicts, bool [images, 2]."""
    equal = float(np.mean(verdicts[:, 0] == verdicts[:, 1]))
    first, second = verdicts.mean(axis=0)
    chance = float(first * second + (1 - first) * (1 - second))
    return Agreement(len(verdicts), equal, None if chance == 1 else (equal - chance) / (1 - chance))


def format_agreement(agreements: Mapping[str, Agreement], where: str) -> str:
    """Returns the table of agreements with another results file."""
    width = max(map(len, agreements))
    lines = [f"Agreement with {where}", f"{'tag':{width}} images   equal  Cohen's kappa"]
    for tag, row in agreements.items():
        kappa = "one verdict only" if row.kappa is None else f"{row.kappa:.3f}"
        lines.append(f"{tag:{width}} {row.images:6} {row.equal:7.2%}  {kappa}")
    return "\n".join(lines)
