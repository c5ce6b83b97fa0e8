"""WISE: scores from a judge's texts, by category and weighted, 0 to 1.

There are two versions with other prompts, judges and scores, whose numbers cannot be compared:
`verified` (one score of 0 or 1) and `legacy` (consistency, realism and aesthetic quality of 0 to
2 each).

Source: Niu et al. 2025 (arXiv 2503.07265); WISE, vllm_eval.py, calculate_verified.py,
WISE_legacy/gpt_eval.py and WISE_legacy/Calculate.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.scores import Score
from corl_jax.evaluation.units import Unit
from corl_jax.input_files import read_text

PROMPTS = 1000
LEGACY_NAMES = ("consistency", "realism", "aesthetic_quality")
LEGACY_WEIGHTS = (0.7, 0.2, 0.1)
# Both as released: two stars may stand on either side of the name, but not behind the colon.
VERIFIED_PATTERN = re.compile(r"\*{0,2}Score\*{0,2}\s*[::]?\s*([01])\b", re.IGNORECASE)
LEGACY_PATTERN = re.compile(
    r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*[::]?\s*(\d)", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Version:
    """A row of VERSIONS."""

    last_ids: Mapping[str, int]  # category -> its largest prompt_id
    weights: Mapping[str, float]
    names: tuple[str, ...]  # keys of the scores file

    def find_category(self, prompt_id: int) -> str | None:
        """Returns the category of an id, or None."""
        if prompt_id < 1:
            return None
        return next((name for name, last in self.last_ids.items() if prompt_id <= last), None)


CATEGORIES = ("CULTURE", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY")
VERSIONS: dict[str, Version] = {
    "verified": Version(
        dict(zip(CATEGORIES, (400, 520, 640, 760, 880, 1000), strict=True)),
        dict(zip(CATEGORIES, (0.4, 0.12, 0.12, 0.12, 0.12, 0.12), strict=True)),
        ("score",),
    ),
    "legacy": Version(
        dict(zip(CATEGORIES, (400, 567, 700, 800, 900, 1000), strict=True)),
        dict(zip(CATEGORIES, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), strict=True)),
        LEGACY_NAMES,
    ),
}


# ---- a judge's text


def extract_verified(text: str) -> int | None:
    """Returns the score of a text; None if it states none.

    It is the first `Score: 0` or `Score: 1`, else the only line that is a bare 0 or 1.
    """
    match = VERIFIED_PATTERN.search(text)
    if match:
        return int(match.group(1))
    bare_lines = _list_bare_lines(text, "01")
    return int(bare_lines[0]) if len(bare_lines) == 1 else None


def extract_legacy(text: str) -> dict[str, float] | None:
    """Returns the three scores of a text by name; None if it does not state all of them.

    The last score of each name counts, whatever its digit. Without all names, three bare lines of
    0 to 2 count in the order of the names.
    """
    scores = {
        name.lower().replace(" ", "_"): float(digit) for name, digit in LEGACY_PATTERN.findall(text)
    }
    if len(scores) == len(LEGACY_NAMES):
        return {name: scores[name] for name in LEGACY_NAMES}
    bare_lines = _list_bare_lines(text, "012")
    if len(bare_lines) == len(LEGACY_NAMES):
        return dict(zip(LEGACY_NAMES, map(float, bare_lines), strict=True))
    return None


def _list_bare_lines(text: str, digits: str) -> list[str]:
    """Returns the lines that are one of the digits."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if len(line) == 1 and line in digits]


def compute_sample_score(version: str, scores: Mapping[str, float]) -> float:
    """Returns the score of an image, 0 to 1: the bit, or (0.7 C + 0.2 R + 0.1 A) / 2."""
    values = [scores[name] for name in VERSIONS[version].names]
    if len(values) == 1:
        return float(values[0])
    return sum(weight * value for weight, value in zip(LEGACY_WEIGHTS, values, strict=True)) / 2


# ---- files


def read_scores(paths: Sequence[Path], version: str) -> tuple[dict[int, float], list[str]]:
    """Reads the score of each prompt from files of either form; returns warnings too.

    A file is the scores file (JSON lines with prompt_id and the scores) or the full results (a
    JSON list with prompt_id and `evaluation`, the judge's text) of the official scripts. As there,
    an id whose text states no score is left out.
    Raises: InputError listing rows that cannot be read.
    """
    problems, samples, warnings = Problems(), {}, []
    for path in paths:
        rows = problems.attempt(_read_rows, path)
        for place, row in enumerate(rows or (), 1):
            where = f"{path}: row {place}"
            prompt_id = row.get("prompt_id") if isinstance(row, dict) else None
            if isinstance(prompt_id, bool) or not isinstance(prompt_id, int):
                problems.add(f"{where}: prompt_id is {prompt_id!r}; expected a whole number")
                continue
            if VERSIONS[version].find_category(prompt_id) is None:
                problems.add(f"{where}: prompt_id is {prompt_id}; expected 1 to {PROMPTS}")
            if prompt_id in samples:
                problems.add(f"{where}: prompt_id {prompt_id} stands twice; expected each id once")
            with problems.collect(f"{where}: "):
                scores = _read_row_scores(row, version)
                if scores is None:
                    warnings.append(f"{where}: the text for id {prompt_id} states no score")
                    continue
                samples[prompt_id] = compute_sample_score(version, scores)
                if samples[prompt_id] > 1:
                    warnings.append(f"{where}: id {prompt_id} has a score above 1, as in {scores}")
    problems.raise_any()
    return samples, warnings


def _read_rows(path: Path) -> list[Any]:
    text = read_text(path, "scores or full results of WISE")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not JSON ({error}); expected JSON lines of scores, or a list of full results"
        ) from None


def _read_row_scores(row: Mapping[str, Any], version: str) -> Mapping[str, float] | None:
    names = VERSIONS[version].names
    if any(name in row for name in names):
        scores: dict[str, Any] = {name: row.get(name) for name in names}
        for name, value in scores.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise InputError(f"{name} is {value!r}; expected a number")
        if scores.get("score", 0) not in (0, 1):
            raise InputError(f"score is {scores['score']!r}; expected 0 or 1")
        return scores
    if not isinstance(row.get("evaluation"), str):
        raise InputError(
            f"found {', '.join(row)}; expected {', '.join(names)} (version {version}), or the "
            "judge's text as `evaluation`; see --version"
        )
    if version == "legacy":
        return extract_legacy(row["evaluation"])
    bit = extract_verified(row["evaluation"])
    return None if bit is None else {"score": bit}


# ---- scores


def group_samples(samples: Mapping[int, float], version: str) -> dict[str, np.ndarray]:
    """Returns the scores of each category, in the order of CATEGORIES."""
    groups: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for prompt_id, score in sorted(samples.items()):
        category = VERSIONS[version].find_category(prompt_id)
        assert category is not None, prompt_id
        groups[category].append(score)
    return {name: np.array(values) for name, values in groups.items() if values}


def find_missing_ids(samples: Mapping[int, float]) -> list[int]:
    """Returns the ids without a score."""
    return [number for number in range(1, PROMPTS + 1) if number not in samples]


def summarize_samples(samples: Mapping[int, float], version: str) -> dict[str, Score]:
    """Returns the score of each category, and `overall` if no id is missing."""
    groups = group_samples(samples, version)
    scores = {name: Score.of([values]) for name, values in groups.items()}
    if not find_missing_ids(samples):
        weights = [VERSIONS[version].weights[name] for name in groups]

        def add_weighted(strata: Sequence[np.ndarray]) -> np.ndarray:
            means = [values.mean(axis=1) for values in strata]
            return np.sum([w * mean for w, mean in zip(weights, means, strict=True)], axis=0)

        scores["overall"] = Score.of([*groups.values()], add_weighted)
    return scores


def make_units(samples: Mapping[int, float], version: str) -> list[Unit]:
    """Returns a unit for each prompt."""
    find_category = VERSIONS[version].find_category
    return [
        Unit(str(number), find_category(number) or "", {"wiscore": score})
        for number, score in sorted(samples.items())
    ]
