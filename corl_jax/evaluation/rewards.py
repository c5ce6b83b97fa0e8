"""Suite `rewards`: the mean training rewards on held-out rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from corl_jax.evaluation.suite import EvaluationInputs


@dataclasses.dataclass(frozen=True)
class RewardsReport:
    """Means and standard errors of rewards, over all processes."""

    values: dict[str, float]

    def metrics(self) -> dict[str, float]:
        return self.values

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> np.ndarray | None:
        return None


def evaluate_rewards(inputs: EvaluationInputs) -> RewardsReport:
    """Returns mean and standard error of each training reward. `inputs.batches` is a Loader."""
    loader: Any = inputs.batches
    assert inputs.score is not None
    num_rows = len(loader.source) if inputs.rows is None else min(inputs.rows, len(loader.source))
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in loader.iterate(0, -(-num_rows // loader.batch_size)):
        for name, values in inputs.score(prompts).items():
            # The last batch may contain rows of a second pass.
            counted = np.repeat(prompts.index < num_rows, len(values) // len(prompts))
            gathered = inputs.gather(np.where(counted, values, np.nan))
            scores.setdefault(f"eval/{name}", []).append(gathered)
    metrics = {}
    for name, pieces in scores.items():
        values = np.concatenate(pieces)
        values = values[~np.isnan(values)]
        metrics[name] = float(values.mean()) if values.size else np.nan
        spread = float(values.std(ddof=1)) if values.size > 1 else np.nan
        metrics[f"{name}_stderr"] = spread / np.sqrt(max(values.size, 1))
    return RewardsReport(metrics)
