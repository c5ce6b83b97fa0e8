"""Measures how the trainer's log-probs of an update differ from the sampler's.

With equal weights both are the same but for rounding. A difference means that the samples are of
another policy than the trained one.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from corl_jax.algorithms.losses import Extremes
from corl_jax.algorithms.ratios import (
    SumAndCount,
    logprob_difference,
    measure_importance_ratio,
)
from corl_jax.metrics import Metric
from corl_jax.tasks import LATENTS

DIFFERENCES = DIFFERENCE_MEAN, DIFFERENCE_MAX = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
)
"""Metrics of the difference between the log-probs of sampler and trainer."""
RATIOS = RATIO_MIN, RATIO_MEAN, RATIO_MAX, RATIO_SHARES = tuple(
    f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max", "shares")
)
"""Metrics of the ratio of their probabilities; the shares are those of a histogram's bins."""
RATIO_FIRST = "ratio_first"
"""Metric of the largest |ratio - 1| of the steps of images."""


def measure_agreement(
    sampler: jax.Array, trainer: jax.Array, mask: jax.Array
) -> tuple[dict[str, SumAndCount], Extremes]:
    """Returns the metrics of log-probs [N, T] of the kept choices, as sums and as extremes."""
    difference, tokens, largest = logprob_difference(sampler, trainer, mask)
    ratio = measure_importance_ratio(sampler, trainer, mask)
    sums = {
        DIFFERENCE_MEAN: (difference, tokens),
        RATIO_MEAN: ratio.mean,
        RATIO_SHARES: ratio.shares,
    }
    return sums, ({DIFFERENCE_MAX: largest, RATIO_MAX: ratio.largest}, {RATIO_MIN: ratio.smallest})


def pick_first(metrics: Mapping[str, jax.Array], kinds: Mapping[str, str]) -> dict[str, Metric]:
    """Returns the metrics of agreement of an update, whose value is that of the first update.

    `kinds` has the kind of each segment, by its metric prefix.
    """
    # Only the first update starts from the policy that sampled, so only its difference between
    # sampler and trainer means anything.
    first = {}
    for prefix, kind in kinds.items():
        names = [f"{prefix}/{name}" for name in (*DIFFERENCES, *RATIOS)]
        first |= {name: Metric(metrics[name], "first") for name in names if name in metrics}
        # Their clip range is so narrow that rounding alone could leave it.
        if kind == LATENTS and f"{prefix}/{RATIO_MAX}" in metrics:
            above = metrics[f"{prefix}/{RATIO_MAX}"] - 1
            below = 1 - metrics[f"{prefix}/{RATIO_MIN}"]
            # Both are negative if no step is in the loss.
            distance = jnp.maximum(jnp.maximum(above, below), 0.0)
            first[f"{prefix}/{RATIO_FIRST}"] = Metric(distance, "first")
    return first
