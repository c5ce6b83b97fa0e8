"""The table of algorithms."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.advantages import AdvantageOptions, RewardInputs
from corl_jax.algorithms.losses import LossConstants, LossInputs
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config.schema import Algorithm


def test_the_config_names_every_recipe():
    description = Algorithm.model_fields["name"].description
    assert all(name in description for name in RECIPES) and Algorithm().name in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compares_rewards_and_makes_a_loss(name):
    recipe = RECIPES[name]
    options = AdvantageOptions(
        reward_weights=(("t2i", (1.0,)), ("mm2t", (1.0, 0.5))),
        task_weights=(("t2i", 1.0), ("mm2t", 0.8)),
        mode="unified_reward", group_size=2, eps=1e-4, scale=recipe.scales[0],
    )  # fmt: skip
    rewards = {
        "t2i": jnp.array([[1.0, 2.0, 3.0, 5.0]]),
        "mm2t": jnp.array([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, jnp.nan, jnp.nan]]),
    }
    greedy = {task: values[:, ::2] for task, values in rewards.items()}
    advantages, stats = recipe.advantages(RewardInputs(rewards, greedy), options)
    assert set(advantages) == set(rewards) and stats
    assert all(values.shape == (4,) for values in advantages.values())
    mask = np.arange(3) < np.array([3, 0, 1, 2])[:, None]
    constants = LossConstants(0.0, recipe.clip_low, recipe.clip_high, recipe.reductions[0])
    inputs = LossInputs(jnp.full((4, 3), -1.0), mask, advantages["t2i"])
    total, count, _ = recipe.loss.compute(inputs, constants)
    assert jnp.isfinite(total)
    assert float(count) == float(recipe.loss.count(mask, constants)), (
        "the loss counts as it is divided"
    )
    assert list(inspect.signature(recipe.loss.compute).parameters) == ["inputs", "constants"]
