"""The loss of MAGVIT-v2's training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.models.magvit import look_up
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.tokenizer_training import (
    COMMITMENT_WEIGHT,
    ENTROPY_WEIGHT,
    magvit_loss,
)
from tests.support import tiny_show_o
from tests.support.tolerances import NETWORK

STAGE = (COMMITMENT_WEIGHT, ENTROPY_WEIGHT)
"""Weights of the stage, given as arrays, so that one program has any weights."""


@pytest.fixture(scope="module")
def params():
    return network.init(tiny_show_o.CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def magvit(params):
    return network.bind(tiny_show_o.CONFIG, params).vqmodel


@pytest.fixture(scope="module")
def compute(params):
    """(pixels, weights) -> (loss, metrics, gradients)."""

    @jax.jit
    def compute(pixels, weights):
        def loss(part):
            model = network.bind(tiny_show_o.CONFIG, params | {"vqmodel": part}).vqmodel
            return magvit_loss(model, pixels, *weights)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params["vqmodel"])
        return value, metrics, grads

    return compute


def make_pixels(rows: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (rows, 16, 16, 3), minval=-1)


def test_the_encoder_learns_past_the_signs(compute):
    """Straight through: without commitment and entropy only the pixels pull at the encoder."""
    _, _, grads = compute(make_pixels(), (0.0, 0.0))
    for part in ("encoder", "decoder"):
        for name, leaf in grads[part].items():
            assert max(np.abs(x).max() for x in jax.tree.leaves(leaf)) > 1e-7, (part, name)


def test_the_loss_adds_up(compute, magvit):
    pixels = make_pixels()
    value, metrics, _ = compute(pixels, STAGE)
    expected = (
        metrics["vq/l1"] + 0.5 * metrics["vq/edges"] + 0.1 * metrics["vq/commitment"]
        + 0.02 * metrics["vq/entropy"]
    )  # fmt: skip
    assert value == pytest.approx(float(expected), rel=NETWORK)
    # The pixels are those that the codes decode to, although the gradient goes past them.
    codes = magvit.encode(pixels)
    error = jnp.abs(magvit.decode(codes) - pixels).mean()
    assert metrics["vq/l1"] == pytest.approx(float(error), rel=NETWORK)
    assert metrics["vq/code_usage"] == len(np.unique(codes)) / tiny_show_o.CODES
    z = magvit.latents(pixels)
    distance = ((z - look_up(codes.reshape(z.shape[:3]), 3)) ** 2).mean()
    assert metrics["vq/commitment"] == pytest.approx(float(distance), rel=NETWORK)


def test_the_entropy_of_all_codes_is_that_of_independent_bits(compute, magvit):
    """The softmax over codes makes each bit 1 with probability sigmoid(2 z / temperature)."""
    pixels = make_pixels()
    _, metrics, _ = compute(pixels, STAGE)
    z = magvit.latents(pixels)
    one = 1 / (1 + np.exp(-2 * np.asarray(z, np.float64).reshape(-1, 3) / 0.5))
    per_latent = -(one * np.log(one) + (1 - one) * np.log(1 - one)).sum(axis=1).mean()
    bits = np.asarray([[code >> 2, code >> 1 & 1, code & 1] for code in range(8)])
    codes = np.where(bits[:, None], one, 1 - one).prod(axis=-1).mean(axis=1)
    expected = per_latent + (codes * np.log(codes)).sum()
    assert metrics["vq/entropy"] == pytest.approx(expected, rel=1e-4)
