"""Means of preference scores over prompts, with intervals: the check against reward hacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.evaluation.bootstrap import average_units, bootstrap_interval
from corl_jax.evaluation.units import Unit
from corl_jax.evaluation.writers.writer import HarnessPrompt

SCORES = {
    "pickscore": "pickscore",
    "hpsv2": "hpsv2",
    "aesthetic": "aesthetic",
    "clip": "t2i_clip_reward",
}
"""Name of a score -> the reward that computes it."""


def make_units(prompts: Sequence[HarnessPrompt], scores: Mapping[str, np.ndarray]) -> list[Unit]:
    """Returns a unit for each prompt: the means of its images' scores [prompts, images]."""
    return [
        Unit(prompt.name, prompt.category, {k: float(v[row].mean()) for k, v in scores.items()})
        for row, prompt in enumerate(prompts)
    ]


def summarize_units(units: Sequence[Unit]) -> dict[str, Any]:
    """Returns each score's mean over prompts with its 95% interval, and the means by category."""
    names = list(units[0].values)
    categories = list(dict.fromkeys(unit.category for unit in units))
    summary: dict[str, Any] = {"scores": {name: _summarize(units, name) for name in names}}
    if len(categories) > 1:
        summary["categories"] = {
            category: {
                name: _summarize([unit for unit in units if unit.category == category], name)
                for name in names
            }
            for category in categories
        }
    return summary


def _summarize(units: Sequence[Unit], name: str) -> dict[str, float]:
    values = np.array([unit.values[name] for unit in units])
    low, high = bootstrap_interval([values], average_units)
    return {"mean": float(values.mean()), "low": low, "high": high, "prompts": len(values)}
