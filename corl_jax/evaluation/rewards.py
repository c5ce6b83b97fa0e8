"""Suite `rewards`: the mean training rewards on held-out rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.runs.pictures import Page


@dataclasses.dataclass(frozen=True)
class RewardsReport:
    """Means and standard errors of rewards, over all processes."""

    values: dict[str, tuple[float, float]]  # metric -> (mean, standard error)

    def metrics(self) -> dict[str, float]:
        """Returns `eval/TASK/NAME` and `eval/TASK/NAME_stderr` of each reward."""
        metrics = {}
        for name, (mean, error) in self.values.items():
            metrics |= {name: mean, f"{name}_stderr": error}
        return metrics

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns metric -> (mean, standard error) of every reward."""
        return self.values

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> Page | None:
        """Returns None: the suite shows no images."""
        return None


def evaluate_rewards(inputs: EvaluationInputs) -> RewardsReport:
    """Computes mean and standard error of each training reward. `inputs.batches` is a Loader."""
    loader: Any = inputs.batches
    assert inputs.score is not None
    num_rows = len(loader.source) if inputs.rows is None else min(inputs.rows, len(loader.source))
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in loader.iterate(0, -(-num_rows // loader.batch_size)):
        for name, values in inputs.score(prompts).items():
            # The last batch may contain rows of a second pass. G = 2: rows [T, F] -> [T, T, F, F]
            counted = np.repeat(prompts.index < num_rows, len(values) // len(prompts))
            gathered = inputs.gather(np.where(counted, values, np.nan))
            scores.setdefault(f"eval/{name}", []).append(gathered)
    return RewardsReport(
        {name: estimate_mean(np.concatenate(pieces)) for name, pieces in scores.items()}
    )


def estimate_mean(values: np.ndarray) -> tuple[float, float]:
    """Computes (mean, standard error) of the values that are not NaN; NaN for too few."""
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else np.nan
    spread = float(values.std(ddof=1)) if values.size > 1 else np.nan
    return mean, spread / np.sqrt(max(values.size, 1))
