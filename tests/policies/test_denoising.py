"""Scores of denoising steps and of given images, with velocities that are known."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.steps import KL_KINDS, Sde, tabulate_transitions
from corl_jax.algorithms.flow.windows import Window
from corl_jax.policies.denoising import (
    MEANS,
    STEPS,
    draw_latents,
    measure_kl,
    score_given,
    score_latents,
    tabulate_sigmas,
)
from corl_jax.policies.family import NOISE_KEYS, Denoising, LogprobOptions
from corl_jax.tasks import LATENTS
from corl_jax.types import Segment

ROWS, SHAPE = 500, (3, 2, 2)
KEYS = jax.random.split(jax.random.key(0), ROWS)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, *SHAPE)), jnp.float32)
GIVEN = Segment(
    LATENTS,
    IMAGES[:, None],
    jnp.ones((ROWS, 1), bool),
    replay={NOISE_KEYS: jax.random.key_data(KEYS)},
)


def spread(times):
    return times.reshape(-1, 1, 1, 1)


def test_the_velocity_from_a_given_image_to_its_noise_has_no_error():
    """x_t = (1 - t) x0 + t eps, so v = eps - x0 = (x_t - x0) / t, and t is sigmoid(normal)."""
    seen = {}

    def point_away(latents, times):
        seen["times"] = times
        return (latents - IMAGES) / spread(times)

    scores, entropies, velocities = score_given(point_away, GIVEN)
    assert scores.shape == (ROWS, 1) and entropies is None and velocities.shape[1:] == (1, *SHAPE)
    np.testing.assert_allclose(scores, 0, atol=1e-6)
    noise = velocities[:, 0] + IMAGES
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    logits = np.log(seen["times"] / (1 - seen["times"]))
    assert abs(logits.mean()) < 0.2 and abs(logits.std() - 1) < 0.15
    # Time and noise are drawn apart.
    assert abs(np.corrcoef(logits, noise.mean(axis=(1, 2, 3)))[0, 1]) < 0.2
    # A velocity that is wrong by 0.5 everywhere has the error 0.25, whatever the time.
    scores, *_ = score_given(lambda x, t: point_away(x, t) + 0.5, GIVEN)
    np.testing.assert_allclose(scores, -0.25, rtol=1e-4)


def shrink(latents, times):
    """The velocity of a network that makes latents smaller."""
    return latents * spread(times)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_a_step_has_the_divergence_of_its_own_place_in_the_schedule(kind):
    denoising = Denoising(6, sde=Sde("flow"), window=Window(2, (0, 3)), kl=kind)

    drawn = draw_latents(shrink, KEYS[:6], 2, SHAPE, denoising)
    steps = np.asarray(drawn.replay[STEPS])
    assert len(np.unique(steps[:, 0])) > 1  # so that the places differ
    logprobs, _, velocities = score_latents(shrink, drawn, denoising)
    assert drawn.logprobs is not None
    np.testing.assert_allclose(logprobs, drawn.logprobs, atol=1e-5)
    options = LogprobOptions(special=None, denoising=denoising)
    found = measure_kl(drawn, velocities + 0.1, velocities, options)
    table = tabulate_transitions(tabulate_sigmas(denoising), denoising.sde)
    expected = 0.01 * np.asarray(KL_KINDS[kind](table))[steps]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


# ---- GRPO-Guard, in the program of a run: sampler, log-probs, loss

# Step 2 of this schedule goes from 0.75 to 0.5, and its first one to 0.9.
SPEC = Denoising(4, "linspace", 3.0, window=Window(1, (2, 2)))
X = jnp.array([[0.5, -1, 2, 0.25]], jnp.float32)
V, V_OTHER = (
    jnp.array([[1.5, 0.5, -0.75, -2]], jnp.float32) + change * jnp.array([1, -2, 3, -4.0])
    for change in (0.0, 0.01)
)
NEXT = {
    "flow": [0.09249033479, -1.031868557, 2.410277061, 0.2656539956],
    "dance": [0.156875, -1.141875, 2.3253125, 0.61875],
}
MEAN = {
    "flow": [-0.089375, -0.910625, 1.7434375, 0.81125],
    "dance": [0.111875, -1.111875, 2.1603125, 0.75375],
}
GUARD_RATIO = {"flow": 0.9941037018, "dance": 0.9951903536}
DRIFT = {"flow": -0.31125, "dance": -0.25375}


def step_of_spec(dynamics):
    """The record of one sample at step 2, as a sampler with the velocity V leaves it."""
    latents = jnp.zeros((1, 5, 4)).at[0, 2].set(X[0]).at[0, 3].set(jnp.array(NEXT[dynamics]))
    replay = {STEPS: jnp.array([[2]]), MEANS: jnp.array([[MEAN[dynamics]]])}
    return Segment(LATENTS, latents, jnp.ones((1, 1), bool), jnp.zeros((1, 1)), replay)


@pytest.mark.parametrize("dynamics", GUARD_RATIO)
def test_the_guard_has_the_published_ratio(dynamics):
    denoising = dataclasses.replace(SPEC, sde=Sde(dynamics, guard="ratio"))
    segment = step_of_spec(dynamics)
    same, _, _ = score_latents(lambda x, t: V, segment, denoising)
    other, _, _ = score_latents(lambda x, t: V_OTHER, segment, denoising)
    assert abs(float(same[0, 0])) < 1e-7
    assert float(jnp.exp(other - same)[0, 0]) == pytest.approx(GUARD_RATIO[dynamics], abs=2e-7)
    # b z / D: the std is gone from the gradient of the plain log-prob, which has w = |b| / std.
    found = jax.grad(lambda v: score_latents(lambda x, t: v, segment, denoising)[0].sum())(V)
    noise = jnp.array([0.3, -0.2, 1.1, -0.9])
    np.testing.assert_allclose(found[0], DRIFT[dynamics] * noise / 4, rtol=1e-5)


@pytest.mark.parametrize("guard", ["ratio", "ratio_per_dt"])
def test_the_sampler_keeps_what_the_guard_reads(guard):
    """At the policy that sampled every log-ratio is 0; plain steps keep no means."""
    denoising = Denoising(6, sde=Sde("flow", guard=guard), window=Window(2, (0, 3)))

    drawn = draw_latents(shrink, KEYS[:6], 2, SHAPE, denoising)
    plain = draw_latents(shrink, KEYS[:6], 2, SHAPE, Denoising(6, sde=Sde("flow"),
                         window=Window(2, (0, 3))))  # fmt: skip
    np.testing.assert_array_equal(drawn.values, plain.values)  # it changes the scores alone
    assert drawn.replay[MEANS].shape == (6, 2, *SHAPE) and MEANS not in plain.replay
    assert not np.asarray(drawn.logprobs).any()
    logprobs, *_ = score_latents(shrink, drawn, denoising)
    np.testing.assert_allclose(logprobs, 0, atol=1e-6)
    if drawn.weights is None:
        assert guard == "ratio"
    else:
        assert guard == "ratio_per_dt"
        np.testing.assert_allclose(drawn.weights, 6, rtol=1e-5)  # steps of 1/6


def test_the_guards_log_ratios_have_mean_zero():
    """E[log rho'] = 0 over the sampler's noise, where the plain log-ratio is below 0."""

    def score(guard):
        denoising = Denoising(4, sde=Sde("flow", guard=guard), window=Window(1, (3, 3)))
        drawn = draw_latents(shrink, KEYS, 1, SHAPE, denoising)
        scores = score_latents(lambda x, t: shrink(x, t) + 0.5, drawn, denoising)
        return np.asarray(scores[0]) - np.asarray(drawn.logprobs)

    for guard, is_centred in (("ratio", True), ("none", False)):
        log_ratios = score(guard)
        error = log_ratios.std() / ROWS**0.5
        assert (abs(log_ratios.mean()) < 4 * error) == is_centred, guard


def test_latents_are_stored_in_the_chosen_dtype():
    """Log-probs are those of the rounded values, which the next step has read."""
    denoising = Denoising(
        4, sde=Sde("flow", latent_dtype="bfloat16"), window=Window(2, (0, 1)), num_tokens=4
    )
    drawn = draw_latents(lambda x, t: x.astype(jnp.float32), KEYS[:4], 2, SHAPE, denoising)
    assert drawn.values.dtype == jnp.bfloat16
    logprobs, *_ = score_latents(lambda x, t: x.astype(jnp.float32), drawn, denoising)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, np.asarray(drawn.logprobs), atol=1e-6)


def test_images_of_a_prompt_begin_with_the_same_noise():
    denoising = Denoising(6, sde=Sde("flow"), window=Window(2, (0, 3)), same_noise=True)
    latents = np.asarray(draw_latents(shrink, KEYS[:6], 2, SHAPE, denoising).values)
    first, second = latents[::2], latents[1::2]
    assert np.array_equal(first[:, 0], second[:, 0])
    assert not np.isclose(first[:, -1], second[:, -1]).any(), "their steps have noise of their own"
    assert not np.isclose(first[0, 0], first[1, 0]).any(), "another prompt has other noise"
    others = draw_latents(shrink, KEYS[2:6], 2, SHAPE, denoising).values
    assert np.array_equal(latents[2:], np.asarray(others)), "no prompt depends on the others"
