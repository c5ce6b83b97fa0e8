"""The supervised loss that gives each completion the same weight, whatever its length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.algorithms.losses import (
    Loss,
    LossConstants,
    LossInputs,
    count_rows,
    negative_log_likelihood,
)
from corl_jax.algorithms.ratios import SumAndCount


def row_likelihood(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Computes the next-token loss of given completions: the mean over rows of each row's mean.

    Rows without a kept token do not count. Metrics are means over tokens.
    """
    _, _, metrics = negative_log_likelihood(inputs, constants)
    losses = -jnp.where(inputs.mask, inputs.logprobs, 0.0).sum(axis=-1)
    total = (losses / jnp.maximum(inputs.mask.sum(axis=-1), 1)).sum()
    return total, count_rows(inputs.mask), metrics


ROW_LIKELIHOOD = Loss(row_likelihood, lambda mask, constants: count_rows(mask))
