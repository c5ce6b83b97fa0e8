"""A new evaluation suite: the share of prompts of which some completion gets a full reward.

Trains with it: python -m docs.examples.best_of_group --config CONFIG.yaml eval.suite=best_of_group
docs/how_to/add_an_evaluation_suite.md explains each part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from corl_jax.evaluation import SUITES, EvaluationInputs, Suite
from corl_jax.evaluation.intervals import Rate

FULL_REWARD = 1.0


@dataclasses.dataclass(frozen=True)
class BestOfGroup:
    """The rate of each reward, over all processes."""

    rates: dict[str, Rate]  # `TASK/NAME` -> rate

    def metrics(self) -> dict[str, float]:
        """Returns `eval/TASK/NAME_best` and the ends of its 95% interval."""
        metrics = {}
        for name, rate in self.rates.items():
            metrics[f"eval/{name}_best"] = rate.mean
            metrics[f"eval/{name}_best_low"] = rate.low
            metrics[f"eval/{name}_best_high"] = rate.high
        return metrics

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns metric -> (rate, standard error)."""
        errors = {name: np.sqrt(r.mean * (1 - r.mean) / r.n) for name, r in self.rates.items()}
        return {f"eval/{name}_best": (r.mean, errors[name]) for name, r in self.rates.items()}

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> np.ndarray | None:
        """Returns None: the suite shows no images."""
        return None


def evaluate_best_of_group(inputs: EvaluationInputs) -> BestOfGroup:
    """Returns the share of held-out prompts with a full reward in their group."""
    loader: Any = inputs.batches
    assert inputs.score is not None
    num_rows = len(loader.source) if inputs.rows is None else min(inputs.rows, len(loader.source))
    best: dict[str, list[np.ndarray]] = {}
    for prompts in loader.iterate(0, -(-num_rows // loader.batch_size)):
        for name, rewards in inputs.score(prompts).items():
            groups = rewards.reshape(len(prompts), -1)
            success = (groups >= FULL_REWARD).any(axis=1).astype(np.float32)
            # The last batch may contain rows of a second pass.
            counted = np.where(prompts.index < num_rows, success, np.nan)
            best.setdefault(name, []).append(inputs.gather(counted))
    rates = {}
    for name, pieces in best.items():
        values = np.concatenate(pieces)
        rates[name] = Rate.of(int(np.nansum(values)), int((~np.isnan(values)).sum()))
    return BestOfGroup(rates)


SUITE = Suite(evaluate_best_of_group, uses_rewards=True)

if __name__ == "__main__":
    SUITES["best_of_group"] = SUITE
    from corl_jax.train.__main__ import main

    main()
