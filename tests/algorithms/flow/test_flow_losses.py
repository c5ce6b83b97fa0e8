"""Losses of denoising steps: the tables of other choices, with steps for tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.estimators import compute_group_advantages
from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import (
    Sde,
    compute_guard_log_ratios,
    compute_kl,
    compute_logprobs,
    compute_weights,
    predict_mean,
    tabulate_transitions,
    take_transitions,
)
from corl_jax.algorithms.losses import (
    CLIPPED_POLICY_LOSS,
    LossConstants,
    LossInputs,
    mask_indifferent,
)
from corl_jax.algorithms.recipes import RECIPES

ROWS, STEPS, SHAPE = 4, 3, (3, 2)
MASK = jnp.ones((ROWS, STEPS), bool)
CLIP = {"clip_low": 1e-4, "clip_high": 1e-4, "advantage_clip": 5.0}
SDE = Sde("flow")
TRANSITION = take_transitions(
    tabulate_transitions(make_sigmas("uniform", 10), SDE), np.tile([2, 3, 4], ROWS)
)
ADVANTAGES = jnp.array([1.5, -0.5, 9.0, 0.0])


def draw(seed):
    values = np.random.default_rng(seed).normal(size=(ROWS * STEPS, *SHAPE))
    return jnp.asarray(values, jnp.float32)


LATENTS, OLD_VELOCITY, NOISE, CHANGE = (draw(seed) for seed in range(4))
OLD_MEAN = predict_mean(LATENTS, OLD_VELOCITY, TRANSITION)
NEXT = OLD_MEAN + TRANSITION.std[:, None, None] * NOISE


def score(velocity):
    """Returns the log-probs [N, T'] of the steps to NEXT."""
    mean = predict_mean(LATENTS, velocity, TRANSITION)
    return compute_logprobs(NEXT, mean, TRANSITION, SDE.dynamics).reshape(ROWS, STEPS)


def compute_loss(velocity, old=None, mask=MASK, loss=CLIPPED_POLICY_LOSS, kl=None, **constants):
    inputs = LossInputs(
        logprobs=score(velocity), mask=mask, advantages=ADVANTAGES, old_logprobs=old, kl=kl
    )
    total, count, metrics = loss.compute(inputs, LossConstants(**CLIP | constants))
    return total / count, metrics


def test_the_clipped_loss_of_steps_by_hand():
    """The mean over samples and steps of max(-A rho, -A clip(rho)), A within +-5."""
    old = score(OLD_VELOCITY)
    velocity = OLD_VELOCITY + 3e-4 * CHANGE
    log_ratio = np.asarray(score(velocity), np.float64) - np.asarray(old, np.float64)
    ratio, a = np.exp(log_ratio), np.clip(ADVANTAGES, -5, 5)[:, None]
    assert 0 < (np.abs(ratio - 1) > 1e-4).sum() < ratio.size  # so that the clip acts on some
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 1e-4, 1 + 1e-4)).mean()
    found, metrics = compute_loss(velocity, old)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    clipped, steps = metrics["clip_ratio/region_mean"]
    outside = ((ratio > 1 + 1e-4) & (a > 0)) | ((ratio < 1 - 1e-4) & (a < 0))
    assert (float(clipped), float(steps)) == (outside.sum(), ROWS * STEPS)


def test_at_the_sampling_policy_a_step_has_the_gradient_of_its_weight():
    """-A sign(drift) w z / (D N T'): steps of a large weight learn most, and A is clipped."""
    found = jax.grad(lambda v: compute_loss(v, score(OLD_VELOCITY))[0])(OLD_VELOCITY)
    weights = np.asarray(compute_weights(TRANSITION)).reshape(ROWS, STEPS)
    per_step = np.clip(ADVANTAGES, -5, 5)[:, None] * weights / (6 * ROWS * STEPS)
    expected = per_step.reshape(-1, 1, 1) * np.asarray(NOISE)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert not np.asarray(found[-STEPS:]).any()  # A = 0


def test_the_exact_divergence_takes_the_place_of_an_estimate():
    velocity, old = OLD_VELOCITY + 1e-2 * CHANGE, score(OLD_VELOCITY)

    def measure(velocity):
        return compute_kl(velocity, OLD_VELOCITY, TRANSITION).reshape(ROWS, STEPS)

    kl = measure(velocity)
    plain, _ = compute_loss(velocity, old)
    found, metrics = compute_loss(velocity, old, kl=kl, kl_coef=1e4)
    assert float(found - plain) == pytest.approx(1e4 * float(kl.mean()), rel=1e-4)
    assert float(metrics["kl"][0]) == pytest.approx(float(kl.sum()), rel=1e-6)
    # Without advantages the gradient is that of the penalty, and at the reference it is 0.
    gradient = jax.grad(lambda v: compute_loss(v, kl=measure(v), kl_coef=0.04)[0])
    penalty = jax.grad(lambda v: 0.04 * measure(v).mean())
    np.testing.assert_allclose(
        gradient(velocity)[-STEPS:], penalty(velocity)[-STEPS:], rtol=1e-5, atol=1e-9
    )
    assert not np.asarray(penalty(OLD_VELOCITY)).any()
    with pytest.raises(ValueError, match=r"kl_coef 0\.04 needs ref_logprobs"):
        compute_loss(velocity, old, kl_coef=0.04)


def test_the_ratio_of_the_guard_goes_through_the_same_loss():
    """Its log-ratio stands for the log-probs, and 0 for the old ones."""
    velocity = OLD_VELOCITY + 1e-3 * CHANGE

    def guard(velocity):
        mean = predict_mean(LATENTS, velocity, TRANSITION)
        ratios = compute_guard_log_ratios(NEXT, mean, OLD_MEAN, TRANSITION, SDE.dynamics)
        return ratios.reshape(ROWS, STEPS)

    def compute(velocity):
        inputs = LossInputs(guard(velocity), MASK, ADVANTAGES, jnp.zeros((ROWS, STEPS)))
        total, count, _ = CLIPPED_POLICY_LOSS.compute(inputs, LossConstants(**CLIP))
        return total / count

    ratio, a = np.exp(np.asarray(guard(velocity), np.float64)), np.clip(ADVANTAGES, -5, 5)[:, None]
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 1e-4, 1 + 1e-4)).mean()
    assert float(compute(velocity)) == pytest.approx(expected, rel=1e-6)
    drift = TRANSITION.drift.reshape(ROWS, STEPS)
    per_step = -a * drift / (6 * ROWS * STEPS)
    found = jax.grad(compute)(OLD_VELOCITY)
    np.testing.assert_allclose(found, per_step.reshape(-1, 1, 1) * NOISE, rtol=1e-3, atol=1e-7)


def test_dropped_rows_do_not_count():
    velocity, old = OLD_VELOCITY + 1e-5 * CHANGE, score(OLD_VELOCITY)
    mask = mask_indifferent(MASK, ADVANTAGES)
    np.testing.assert_array_equal(mask, np.asarray(MASK) & np.array([[1], [1], [1], [0]], bool))
    found, _ = compute_loss(velocity, old, mask)
    whole, _ = compute_loss(velocity, old)
    assert float(found) == pytest.approx(float(whole) * ROWS / (ROWS - 1), rel=1e-5)


def test_groups_with_equal_rewards_are_dropped():
    rewards = jnp.array([0.3, 0.3, 0.1, 0.9])
    for scale in ("group", "batch"):
        advantages = compute_group_advantages(rewards, 2, scale=scale, ddof=0)
        mask = mask_indifferent(MASK, advantages)
        np.testing.assert_array_equal(mask.any(axis=1), [False, False, True, True])


@pytest.mark.parametrize("name", RECIPES)
def test_every_loss_takes_steps_for_tokens(name):
    """At the sampling policy all steps of a sample have its advantage, whatever the loss."""
    found = jax.grad(lambda v: compute_loss(v, score(OLD_VELOCITY), loss=RECIPES[name].loss)[0])(
        OLD_VELOCITY
    )
    expected = jax.grad(lambda v: compute_loss(v, score(OLD_VELOCITY))[0])(OLD_VELOCITY)
    # One ratio for a whole trajectory: its log is the sum over steps, not their mean.
    factor = STEPS if name == "rloo" else 1
    np.testing.assert_allclose(found, factor * expected, rtol=1e-4, atol=1e-7)
