"""The alignment of states with features, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.alignment import measure_alignment
from corl_jax.algorithms.likelihoods import negative_log_likelihood
from corl_jax.algorithms.losses import LossConstants, LossInputs

STATES = jnp.array([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [5.0, 12.0]]])
FEATURES = jnp.array([[[4.0, 3.0], [0.0, 7.0]], [[0.0, -1.0], [5.0, 12.0]]])


def test_it_is_the_mean_cosine_of_the_places():
    """24 / 25 and 0; -1 and 1."""
    np.testing.assert_allclose(measure_alignment(STATES, FEATURES), [0.48, 0.0], atol=1e-6)
    rounded = measure_alignment(STATES.astype(jnp.bfloat16), FEATURES)
    assert rounded.dtype == jnp.float32


def test_the_features_are_targets_and_get_no_gradient():
    gradients = jax.grad(lambda *x: measure_alignment(*x).sum(), argnums=(0, 1))(STATES, FEATURES)
    assert np.abs(gradients[0]).max() > 0 and (gradients[1] == 0).all()
    zeros = jax.grad(lambda x: measure_alignment(x, FEATURES).sum())(jnp.zeros_like(STATES))
    assert np.isfinite(zeros).all()


def test_the_loss_is_less_the_weighted_alignment():
    """Errors 1 and 3, alignments 0.5 and -0.1, weight 2: mean 2, less 2 * 0.2."""
    inputs = LossInputs(
        logprobs=jnp.array([[-1.0], [-3.0]]), mask=jnp.ones((2, 1), bool),
        alignment=jnp.array([[0.5], [-0.1]]),
    )  # fmt: skip
    total, count, metrics = negative_log_likelihood(inputs, LossConstants(alignment_weight=2.0))
    assert total / count == pytest.approx(2 - 2 * 0.2)
    assert metrics["nll"][0] / count == 2
    assert metrics["alignment"][0] / count == pytest.approx(0.2)
