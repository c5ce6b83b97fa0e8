"""A new algorithm: a quantile of the group's rewards is the baseline, in place of their mean.

Trains with it: python -m docs.examples.quantile --config CONFIG.yaml algorithm.name=quantile
docs/how_to/add_an_algorithm.md explains each part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.algorithms.advantages import AdvantageOptions, RewardInputs, compare_rewards
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS
from corl_jax.algorithms.recipes import RECIPES, Recipe

QUANTILE = 0.5


def quantile_advantages(rewards: jax.Array, group_size: int, eps: float = 1e-4) -> jax.Array:
    """Returns how far each reward is above a quantile of its group, over the group's std [N].

    `rewards` [N], NaN where not applicable; such a row is left out and gets 0, as does a row
    without others.
    Source: quantile advantage estimation (arXiv 2509.22611).
    """
    groups = jnp.reshape(rewards, (-1, group_size))  # [p0s0, p0s1, p1s0, ..] -> a row a prompt
    several = (~jnp.isnan(groups)).sum(axis=1, keepdims=True) > 1
    baseline = jnp.nanquantile(groups, QUANTILE, axis=1, keepdims=True)
    std = jnp.nanstd(groups, axis=1, ddof=1, keepdims=True)
    advantages = (groups - baseline) / (std + eps)
    return jnp.where(several & ~jnp.isnan(groups), advantages, 0.0).reshape(-1)


def compare_with_quantile(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (advantages [N] by task, statistics) of rewards [F, N] by task."""
    return compare_rewards(
        inputs, options, lambda r: quantile_advantages(r, options.group_size, options.eps)
    )


QUANTILE_BASELINE = Recipe(
    compare_with_quantile, CLIPPED_POLICY_LOSS, ignored=frozenset({"scale"}), clip_high=0.28
)

if __name__ == "__main__":
    RECIPES["quantile"] = QUANTILE_BASELINE
    from corl_jax.train.__main__ import main

    main()
