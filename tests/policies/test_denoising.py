"""Scores of denoising steps and of given images, with velocities that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.steps import KL_KINDS, Sde, tabulate_transitions
from corl_jax.algorithms.flow.windows import Window
from corl_jax.policies.denoising import (
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


@pytest.mark.parametrize("kind", KL_KINDS)
def test_a_step_has_the_divergence_of_its_own_place_in_the_schedule(kind):
    denoising = Denoising(6, sde=Sde("flow"), window=Window(2, (0, 3)), kl=kind)

    def shrink(latents, times):
        return latents * spread(times)

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
