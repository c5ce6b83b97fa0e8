"""Losses, gradients and advantages against the trainers of TRL on random inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.advantages import AdvantageOptions, RewardInputs
from corl_jax.algorithms.divergences import estimate_kl
from corl_jax.algorithms.losses import LossConstants, LossInputs, weigh_by_entropy
from corl_jax.algorithms.recipes import RECIPES
from tests.support.trl_trainers import (
    GRPOTrainer,
    RLOOTrainer,
    compute_advantages,
    compute_loss,
)

ROWS, TOKENS, GROUP = 8, 7, 4
TOLERANCE = 1e-5
TOKEN_MEAN, CONSTANT = {"reduction": "token_mean"}, {"reduction": "constant"}
SEQUENCE = {"importance_sampling_level": "sequence"}
CAPPED = {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.5}
# (recipe, our constants, TRL's attributes)
LOSSES = {
    "grpo": ("grpo", {}, {"loss_type": "grpo"}),
    "grpo, beta": ("grpo", {"kl_coef": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "bnpo": ("grpo", TOKEN_MEAN, {"loss_type": "bnpo"}),
    "bnpo, beta": ("grpo", TOKEN_MEAN | {"kl_coef": 0.3}, {"loss_type": "bnpo", "beta": 0.3}),
    "dr_grpo": ("dr_grpo", CONSTANT, {"loss_type": "dr_grpo"}),
    "dr_grpo, beta": (
        "dr_grpo", CONSTANT | {"kl_coef": 0.3}, {"loss_type": "dr_grpo", "beta": 0.3},
    ),
    "dapo": (
        "dapo", TOKEN_MEAN | {"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "delta": ("grpo", {"dual_clip": 1.6}, {"loss_type": "grpo", "delta": 1.6}),
    "gspo": ("gspo", {}, SEQUENCE),
    "gspo, narrow": (
        "gspo", {"clip_low": 3e-4, "clip_high": 4e-4},
        SEQUENCE | {"epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, token mean": ("gspo", TOKEN_MEAN, SEQUENCE | {"loss_type": "dapo"}),
    "gspo, delta": ("gspo", {"dual_clip": 1.21}, SEQUENCE | {"delta": 1.21}),
    "cispo": (
        "cispo", TOKEN_MEAN | {"clip_high": 0.4}, {"loss_type": "cispo", "epsilon_high": 1.4},
    ),
    "cispo, beta": (
        "cispo", TOKEN_MEAN | {"clip_high": 4.0, "kl_coef": 0.3},
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.3},
    ),
    "cap": ("grpo", {"importance_cap": 1.5}, CAPPED),
    "cap, beta": ("grpo", {"importance_cap": 1.5, "kl_coef": 0.3}, CAPPED | {"beta": 0.3}),
    "cap, cispo": (
        "cispo", TOKEN_MEAN | {"clip_high": 0.4, "importance_cap": 1.5},
        CAPPED | {"loss_type": "cispo", "epsilon_high": 1.4},
    ),
    "rloo": ("rloo", {}, {}),
}  # fmt: skip


def draw_arrays(rows=ROWS, seed=0):
    """Log-probs whose ratios lie on both sides of each clip, and rows of several lengths."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(size=(rows, TOKENS))

    def move(size):
        return logprobs + rng.normal(scale=size, size=(rows, TOKENS))

    arrays = {
        "logprobs": logprobs, "old_logprobs": move(0.3), "ref_logprobs": move(0.5),
        "sampler_logprobs": move(0.4), "advantages": rng.normal(size=rows),
        "entropy": rng.exponential(size=(rows, TOKENS)),
    }  # fmt: skip
    lengths = rng.integers(1, TOKENS + 1, rows)
    lengths[0] = TOKENS
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {
        "mask": np.arange(TOKENS) < lengths[:, None]
    }


def compute_own_loss(name, arrays, constants):
    """Returns our (loss, gradient in the log-probs)."""

    def loss(logprobs):
        inputs = LossInputs(**arrays | {"logprobs": logprobs})
        total, count, _ = RECIPES[name].loss.compute(inputs, LossConstants(**constants))
        return total / count

    return jax.value_and_grad(loss)(jnp.asarray(arrays["logprobs"]))


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_gradients_are_those_of_trl(case):
    name, constants, attributes = LOSSES[case]
    kind = RLOOTrainer if name == "rloo" else GRPOTrainer
    for seed in range(2):
        arrays = draw_arrays(seed=seed)
        expected, expected_gradient = compute_loss(kind, arrays, **attributes)
        found, gradient = compute_own_loss(name, arrays, constants)
        assert float(found) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=TOLERANCE, atol=TOLERANCE)
        assert np.abs(expected_gradient).max() > 0.01


@pytest.mark.parametrize("share", [0.5, 0.4])
def test_tokens_of_the_highest_entropy_are_those_of_trl(share):
    """TRL takes the share over a batch, we over a row: they agree for one row."""
    arrays = draw_arrays(rows=1)
    expected, expected_gradient = compute_loss(
        GRPOTrainer, arrays, top_entropy_quantile=share, beta=0.3
    )
    arrays["weights"] = weigh_by_entropy(arrays["entropy"], arrays["mask"], share)
    assert 0 < arrays["weights"].sum() < TOKENS
    found, gradient = compute_own_loss("grpo", arrays, {"kl_coef": 0.3})
    assert float(found) == pytest.approx(expected, rel=TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=TOLERANCE, atol=TOLERANCE)


# ---- advantages


def draw_rewards(functions):
    """Rewards [F, N]; a group without function 0, and two rows without any reward."""
    rewards = np.random.default_rng(1).normal(size=(functions, 4 * GROUP)).astype(np.float32)
    if functions > 1:
        rewards[0, :GROUP] = np.nan
    rewards[:, [1, 6]] = np.nan
    rewards[:, 2 * GROUP : 3 * GROUP] = 0.25  # equal
    return rewards


def compute_own_advantages(name, rewards, penalties=None, scale=None):
    options = AdvantageOptions(
        reward_weights=(("t2i", (1.0,) * len(rewards)),), task_weights=(("t2i", 1.0),),
        mode="unified_reward", group_size=GROUP, scale=scale or RECIPES[name].scales[0],
    )  # fmt: skip
    inputs = RewardInputs({"t2i": rewards}, penalties=penalties)
    found, _ = RECIPES[name].advantages(inputs, options)
    return found["t2i"]


@pytest.mark.parametrize("functions", [1, 3])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl(scale, functions):
    rewards = draw_rewards(functions)
    expected = compute_advantages(GRPOTrainer, rewards, GROUP, scale_rewards=scale)
    found = compute_own_advantages("grpo", rewards, scale=scale)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("functions", [1, 3])
def test_gdpo_is_that_of_trl(functions):
    rewards = draw_rewards(functions)
    expected = compute_advantages(
        GRPOTrainer, rewards, GROUP, multi_objective_aggregation="normalize_then_sum"
    )
    found = compute_own_advantages("gdpo", rewards)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("scale", ["none", "batch"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_leave_one_out_is_that_of_trl(scale, beta):
    """With the KL penalty in the reward: the sum of k1 over the completion."""
    rng = np.random.default_rng(2)
    logprobs, ref_logprobs = (
        -rng.exponential(size=(4 * GROUP, TOKENS)).astype(np.float32) for _ in range(2)
    )
    rewards = draw_rewards(2)
    expected = compute_advantages(
        RLOOTrainer, rewards, GROUP, logprobs, ref_logprobs, beta=beta,
        normalize_advantages=scale == "batch",
    )  # fmt: skip
    penalties = {"t2i": beta * estimate_kl(logprobs, ref_logprobs, "k1").sum(axis=1)}
    found = compute_own_advantages("rloo", rewards, penalties if beta else None, scale)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
