"""A new algorithm: RLOO, the reward minus the mean of the other rewards of its group.

Trains with it: python -m docs.examples.rloo --config CONFIG.yaml algorithm.name=rloo
docs/how_to/add_an_algorithm.md explains each part.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from corl_jax.algorithms.advantages import (
    AdvantageOptions,
    describe_rewards,
    join_rewards,
    total_rewards,
)
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS
from corl_jax.algorithms.recipes import RECIPES, Recipe


def leave_one_out_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Returns how far each reward is above the mean of the others of its group [N].

    `rewards` [N], NaN where not applicable; such a row is left out and gets 0, as does a row
    without others.
    Source: RLOO (arXiv 2402.14740) section 3.
    """
    groups = jnp.reshape(rewards, (-1, group_size))  # [p0s0, p0s1, p1s0, ..] -> a row a prompt
    valid = ~jnp.isnan(groups)
    kept = jnp.where(valid, groups, 0.0)
    others = valid.sum(axis=1, keepdims=True) - 1
    mean_of_others = (kept.sum(axis=1, keepdims=True) - kept) / jnp.maximum(others, 1)
    return jnp.where(valid & (others > 0), kept - mean_of_others, 0.0).reshape(-1)


def leave_one_out(
    rewards: Mapping[str, jax.Array], options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (advantages [N] by task, statistics) of rewards [F, N] by task."""
    totals = total_rewards(rewards, options)
    advantages = leave_one_out_advantages(join_rewards(totals, options), options.group_size)
    return dict.fromkeys(totals, advantages), describe_rewards(totals, options)


RLOO = Recipe(
    leave_one_out,
    CLIPPED_POLICY_LOSS,
    ignored=frozenset({"advantages", "scale_by_std", "multi_objective_aggregation"}),
)

if __name__ == "__main__":
    RECIPES["rloo"] = RLOO
    from corl_jax.train.__main__ import main

    main()
