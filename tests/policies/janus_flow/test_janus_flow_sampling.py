"""Latents equal a slow loop over whole sequences; a sample depends on its key and prompt alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from corl_jax.policies.janus_flow.velocities import make_sampler_velocity, make_scored_velocity

from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.sampling import draw_noise, integrate, sample_latents
from corl_jax.types import EncodedPrompts
from tests.parity import torch_janus_flow
from tests.support.tolerances import LOGPROBS, NETWORK

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PROMPTS = ([1, 5, 6, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37])
LENGTH, GROUP, STEPS = 10, 2, 3

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def reference():
    return torch_janus_flow.tiny_flow()


@pytest.fixture(scope="module")
def config(reference):
    return torch_janus_flow.jax_config(reference)


@pytest.fixture(scope="module")
def params(reference):
    return torch_janus_flow.flow_params(reference)


def pad_left(rows, length: int = LENGTH) -> EncodedPrompts:
    ids = np.full((len(rows), length), SPECIAL.pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    return EncodedPrompts(ids, mask)


def sample(config, params, keys, rows=PROMPTS, **changes):
    options = {"num_steps": STEPS, "cfg_scale": 2.0, "dtype": jnp.float32, "special": SPECIAL}
    length = changes.pop("length", LENGTH)
    return np.asarray(
        sample_latents(config, params, pad_left(rows, length), keys, **options | changes)
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_latents_equal_the_original_loop(config, params, reference, scale):
    """The released loop: from u = 0, with its own direction, one row at a time."""
    keys = sample_keys(0, np.arange(len(PROMPTS)), GROUP)
    found = sample(config, params, keys, cfg_scale=scale)
    noise = np.array(draw_noise(keys, config.latent_shape))
    for i, start in enumerate(noise):
        z = torch.from_numpy(start).permute(2, 0, 1)[None]
        for number in range(STEPS):
            with torch.no_grad():
                ids = PROMPTS[i // GROUP]
                conditional = reference.velocity(z, number / STEPS, ids)
                blank = reference.velocity(z, number / STEPS, ids, hidden=True)
            z = z + (scale * conditional - (scale - 1) * blank) / STEPS
        np.testing.assert_allclose(
            found[i], z[0].permute(1, 2, 0).numpy(), atol=LOGPROBS, err_msg=str(i)
        )


def test_a_sample_depends_on_its_key_and_prompt_alone(config, params):
    keys = sample_keys(0, np.arange(len(PROMPTS)), GROUP)
    whole = sample(config, params, keys)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    alone = sample(config, params, keys[2:], PROMPTS[1:], length=12)
    np.testing.assert_allclose(alone, whole[2:], atol=LOGPROBS)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_scoring_sees_the_velocity_of_the_sampler(config, params, scale):
    prompts, guided = pad_left(PROMPTS), scale != 1
    keys = sample_keys(0, np.arange(len(PROMPTS)), GROUP)
    latents, times = draw_noise(keys, config.latent_shape), jnp.array([1.0, 0.5, 0.9, 0.1])

    @jax.jit
    def compute(params):
        model = network.bind(config, params)
        first = make_sampler_velocity(model, prompts, SPECIAL, scale, guided)
        second = make_scored_velocity(model, prompts, SPECIAL, scale, guided)
        return first(latents, times), second(latents, times)

    first, second = compute(params)
    np.testing.assert_allclose(first, second, atol=NETWORK)


def test_gradients_flow_through_both_branches(config, params):
    prompts = pad_left(PROMPTS)
    keys = sample_keys(0, np.arange(len(PROMPTS)), GROUP)
    latents, times = draw_noise(keys, config.latent_shape), jnp.full(4, 0.5)

    @jax.jit
    @jax.grad
    def compute(table, scale):
        inner = params["language_model"] | {"embed_tokens": {"embedding": table}}
        model = network.bind(config, params | {"language_model": inner})
        velocity = make_scored_velocity(model, prompts, SPECIAL, scale, True)
        return jnp.square(velocity(latents, times)).mean()

    table = jnp.asarray(params["language_model"]["embed_tokens"]["embedding"])
    # With the scale 0 the prompts count for nothing: BOS alone is read, and the pad is hidden.
    for scale, expected in ((2.0, {1, *PROMPTS[0], *PROMPTS[1]}), (0.0, {1})):
        gradient = np.asarray(compute(table, scale))
        assert np.isfinite(gradient).all()
        assert {*np.flatnonzero(np.abs(gradient).max(axis=1)).tolist()} == expected


def test_euler_steps_of_a_straight_flow_end_at_the_data():
    """noise - data does not change on the way, so any number of steps is exact."""
    noise, data = jnp.full((2, 1, 1, 1), 3.0), jnp.array([1.0, -2.0]).reshape(2, 1, 1, 1)
    latents = integrate(lambda latents, times: noise - data, noise, 7)
    np.testing.assert_allclose(latents, data, atol=1e-6)
