"""The VAE by itself: its size, its distribution, its latents' scale and its images."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.models import modules
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.params import flatten
from tests.support.tiny_vae import CONFIG, make_params

# As the specification states them.
COUNTS = {"decoder": 49_490_179, "post_quant_conv": 20, "encoder": 34_163_592, "quant_conv": 72}


def compute(method: str, params, *arrays):
    return jax.jit(
        lambda params, *arrays: getattr(modules.bind(SdVae, CONFIG, params), method)(*arrays)
    )(params, *arrays)


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(1).normal(size=(2, 2, 3, 3)).astype(np.float32)


def test_parameter_counts_of_sdxl():
    counts = dict.fromkeys(COUNTS, 0)
    for path, leaf in flatten(modules.make_abstract(SdVae, SdVaeConfig())).items():
        counts[path.split("/")[0]] += math.prod(leaf.shape)
    assert counts == COUNTS
    assert counts["decoder"] + counts["post_quant_conv"] == 49_490_199
    assert counts["encoder"] + counts["quant_conv"] == 34_163_664
    assert SdVaeConfig().downsample == 8


def test_the_logarithm_of_the_variance_has_limits(params, pixels):
    channels = CONFIG.latent_channels
    far = jnp.array([0.0] * channels + [1e3, -1e3, 0.0])
    moved = {**params, "quant_conv": {**params["quant_conv"], "bias": far}}
    mean, logvar = compute("encode", moved, pixels)
    assert mean.shape == logvar.shape == (2, 2, 3, channels)
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()
    assert (abs(logvar[..., 2]) < 10).all() and jnp.std(logvar[..., 2]) > 0
    assert (abs(mean) < 10).all()


def test_scaled_latents_are_the_mean(params, pixels):
    mean, _ = compute("encode", params, pixels)
    scaled = compute("encode_mean", params, pixels)
    np.testing.assert_allclose(scaled, mean * np.float32(0.13025), rtol=1e-5)


def test_images_are_cut_off_and_not_rounded(params, latents):
    decoded = compute("decode", params, latents / np.float32(0.13025))
    np.testing.assert_allclose(compute("decode_scaled", params, latents), decoded, atol=1e-5)
    assert decoded.shape == (2, 16, 24, 3) and decoded.dtype == jnp.float32
    # A bias puts single values where they show the rule; without a kernel nothing else is added.
    last = params["decoder"]["conv_out"]
    for value, code in ((-3, 0), (-1, 0), (0, 127), (0.999, 254), (1, 255), (5, 255)):
        constant = {"kernel": jnp.zeros_like(last["kernel"]), "bias": jnp.full(3, float(value))}
        decoder = {**params["decoder"], "conv_out": constant}
        images = compute("draw_pixels", {**params, "decoder": decoder}, latents)
        assert images.dtype == jnp.uint8 and (images == code).all()


def test_bfloat16_is_near_float32_and_float16_is_refused(params, pixels, latents):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for method, array in (("encode_mean", pixels), ("decode", latents)):
        exact, rounded = compute(method, params, array), compute(method, half, array)
        assert rounded.dtype == jnp.float32
        difference = np.abs(exact - rounded).max() / np.abs(exact).max()
        assert 1e-4 < difference < 0.05
    with pytest.raises(ValueError, match="float16"):
        compute("decode", jax.tree.map(lambda x: x.astype(jnp.float16), params), latents)
