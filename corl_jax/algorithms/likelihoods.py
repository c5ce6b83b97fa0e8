"""The losses of given completions: the mean over tokens, or over completions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.algorithms.losses import (
    Loss,
    LossConstants,
    LossInputs,
    count_rows,
    count_tokens,
)
from corl_jax.algorithms.ratios import SumAndCount


def negative_log_likelihood(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Computes the next-token loss of given completions: the mean over kept tokens.

    With alignments the loss is less their mean times `alignment_weight`; `nll` is without them.
    """
    tokens = count_tokens(inputs.mask)
    total = -jnp.where(inputs.mask, inputs.logprobs, 0.0).sum()
    metrics = {"nll": (total, tokens)}
    if inputs.entropy is not None:
        metrics["entropy"] = jnp.where(inputs.mask, inputs.entropy, 0.0).sum(), tokens
    if inputs.alignment is not None:
        alignment = jnp.where(inputs.mask, inputs.alignment, 0.0).sum()
        metrics["alignment"] = alignment, tokens
        total -= constants.alignment_weight * alignment
    return total, tokens, metrics


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
NEGATIVE_LOG_LIKELIHOOD = Loss(negative_log_likelihood, lambda mask, constants: count_tokens(mask))
