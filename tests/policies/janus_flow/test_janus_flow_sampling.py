"""Latents equal a slow loop over whole sequences, and scoring computes what the sampler did."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.trajectory import draw_noise
from corl_jax.algorithms.flow.windows import Window
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.denoising import STEPS
from corl_jax.policies.family import NOISE_KEYS, Denoising, LogprobOptions, SamplingOptions
from corl_jax.policies.janus_flow.family import FAMILY
from corl_jax.policies.janus_flow.images import decode_images, encode_images
from corl_jax.policies.janus_flow.logprobs import score_answers, score_steps
from corl_jax.policies.janus_flow.sampling import sample_answers, sample_latents
from corl_jax.tasks import LATENTS
from corl_jax.types import Segment
from tests.parity import torch_janus_flow
from tests.support import tiny_flow
from tests.support.tiny_flow import CONFIG, SPECIAL, pad_left
from tests.support.tolerances import LOGPROBS

PROMPTS = ([1, 5, 6, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37])
LENGTH, GROUP, COUNT = 10, 2, 3
RATIO = 1e-5
"""Largest |ratio - 1| of a step that is scored with the weights that drew it."""

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def params():
    return jax.device_put(tiny_flow.make_params())


def make_keys(group: int = GROUP) -> jax.Array:
    return sample_keys(0, np.arange(len(PROMPTS)), group)


def make_options(denoising: Denoising, scale: float = 2.0, **changes: Any) -> SamplingOptions:
    changes = {"cfg_scale": scale, "dtype": jnp.float32, "special": SPECIAL} | changes
    return SamplingOptions(**changes, denoising=denoising)


def sample(config, params, keys, rows=PROMPTS, length=LENGTH, scale=2.0, **changes: Any) -> Segment:
    options = make_options(Denoising(COUNT, **changes), scale)
    (segment,) = sample_latents(config, params, pad_left(rows, length), keys, options)
    return segment


def test_images_are_drawn_in_30_steps_without_noise():
    assert SamplingOptions(SPECIAL).denoising.steps == 30
    assert SamplingOptions(SPECIAL).denoising.is_greedy
    assert FAMILY.defaults == {"cfg_scale": 2.0}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_latents_equal_the_original_loop(scale):
    """The released loop: from u = 0, with its own direction, one row at a time."""
    reference = torch_janus_flow.tiny_flow()
    config, keys = torch_janus_flow.jax_config(reference), make_keys()
    found = sample(config, torch_janus_flow.flow_params(reference), keys, scale=scale)
    assert found.kind == LATENTS and found.values.shape == (4, 1, *config.latent_shape)
    assert found.logprobs is None and found.mask.shape == (4, COUNT)
    for i, start in enumerate(np.array(draw_noise(keys, config.latent_shape))):
        z = torch.from_numpy(start).permute(2, 0, 1)[None]
        for number in range(COUNT):
            with torch.no_grad():
                ids = PROMPTS[i // GROUP]
                conditional = reference.velocity(z, number / COUNT, ids)
                blank = reference.velocity(z, number / COUNT, ids, hidden=True)
            z = z + (scale * conditional - (scale - 1) * blank) / COUNT
        expected = z[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found.values[i, 0], expected, atol=LOGPROBS, err_msg=str(i))


@pytest.mark.parametrize("dynamics", ["ode", "flow"])
def test_a_sample_depends_on_its_key_and_prompt_alone(params, dynamics):
    keys = make_keys()
    changes = {
        "sde": Sde(dynamics),
        "window": Window(1, (0, 1)) if dynamics == "flow" else Window(),
    }
    whole = np.asarray(sample(CONFIG, params, keys, **changes).values)
    assert np.abs(whole[0, -1] - whole[1, -1]).max() > 0.1
    alone = sample(CONFIG, params, keys[2:], PROMPTS[1:], length=12, **changes).values
    np.testing.assert_allclose(alone, whole[2:], atol=LOGPROBS)
    assert whole.shape[1] == (1 if dynamics == "ode" else COUNT + 1)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("dynamics", "window"),
    [("flow", Window()), ("dance", Window(2, (0, 1))), ("cps", Window(1, (0, 1)))],
)
def test_scored_steps_have_the_log_probs_of_the_sampler(params, dynamics, window, scale):
    """In float32 far below the clip range of 1e-4, however many images are scored at once."""
    denoising = Denoising(COUNT, sde=Sde(dynamics), window=window)
    prompts, keys = pad_left(PROMPTS, LENGTH), make_keys()
    (drawn,) = sample_latents(CONFIG, params, prompts, keys, make_options(denoising, scale))
    assert drawn.logprobs is not None and drawn.logprobs.shape == drawn.replay[STEPS].shape
    options = LogprobOptions(SPECIAL, cfg_scale=scale, denoising=denoising)

    @jax.jit
    def score(params, prompts, segment):
        return score_steps(CONFIG, params, prompts, (segment,), options)[0]

    logprobs, entropies, velocities = score(params, prompts, drawn)
    assert np.abs(np.exp(logprobs - drawn.logprobs) - 1).max() < RATIO
    assert entropies is None
    assert velocities.shape == (*logprobs.shape, *CONFIG.latent_shape)
    for i in range(len(PROMPTS)):  # one prompt at a time
        rows = slice(i * GROUP, (i + 1) * GROUP)
        part = jax.tree.map(lambda x: x[rows], drawn)  # noqa: B023
        alone, *_ = score(params, jax.tree.map(lambda x: x[i : i + 1], prompts), part)  # noqa: B023
        np.testing.assert_allclose(alone, logprobs[rows], atol=RATIO)


def test_images_of_a_group_have_noise_at_the_same_steps(params):
    group, prompts = 3, 6
    keys = sample_keys(0, np.arange(prompts), group)
    drawn = sample(
        CONFIG, params, keys, [PROMPTS[0]] * prompts, sde=Sde("flow"), window=Window(1, (0, 1))
    )
    steps = np.asarray(drawn.replay[STEPS]).reshape(prompts, group)
    assert (steps == steps[:, :1]).all() and {0, 1} == {*steps[:, 0].tolist()}


@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_gradients_flow_through_both_branches(params, scale):
    denoising = Denoising(COUNT, sde=Sde("flow"), window=Window(1, (0, 0)))
    prompts = pad_left(PROMPTS, LENGTH)
    (drawn,) = sample_latents(CONFIG, params, prompts, make_keys(), make_options(denoising, scale))
    options = LogprobOptions(SPECIAL, cfg_scale=scale, denoising=denoising)

    @jax.jit
    @jax.grad
    def compute(table):
        inner = params["language_model"] | {"embed_tokens": {"embedding": table}}
        scored = score_steps(CONFIG, params | {"language_model": inner}, prompts, (drawn,), options)
        return scored[0][0].sum()

    gradient = np.asarray(compute(params["language_model"]["embed_tokens"]["embedding"]))
    assert np.isfinite(gradient).all()
    # With the scale 0 the prompts count for nothing: BOS alone is read, and the pad is hidden.
    expected = {1, *PROMPTS[0], *PROMPTS[1]} if scale else {1}
    assert {*np.flatnonzero(np.abs(gradient).max(axis=1)).tolist()} == expected


def test_the_loss_of_given_images_is_that_of_rectified_flow(params):
    """By hand: the error of the velocity at the time and with the noise of each image's key."""
    prompts, keys = pad_left(PROMPTS, LENGTH), make_keys(1)
    pixels = jax.random.uniform(keys[0], (2, 16, 16, 3), minval=-1.0)
    latents = encode_images(CONFIG, params, pixels)
    given = Segment(
        LATENTS, latents, jnp.ones((2, 1), bool), replay={NOISE_KEYS: jax.random.key_data(keys)}
    )
    # Data are scored without guidance, whatever the option says.
    options = LogprobOptions(SPECIAL, cfg_scale=3.0, is_given=True)
    ((scores, _, *velocities),) = score_steps(CONFIG, params, prompts, (given,), options)
    noise = draw_noise(keys, CONFIG.latent_shape)
    errors = np.square(velocities[0][:, 0] - (noise - latents[:, 0])).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(scores[:, 0], -errors, rtol=1e-5)


def test_pixels_become_latents_and_back_in_any_number(params):
    pixels = jax.random.uniform(jax.random.key(0), (9, 16, 16, 3), minval=-1.0)
    latents = encode_images(CONFIG, params, pixels)
    assert latents.shape == (9, 1, *CONFIG.latent_shape)
    drawn = decode_images(CONFIG, params, latents)
    assert drawn.shape == (9, 16, 16, 3) and drawn.dtype == jnp.uint8
    np.testing.assert_allclose(encode_images(CONFIG, params, pixels[8:]), latents[8:], atol=1e-5)


def test_answers_are_scored_as_they_were_drawn(params):
    prompts, keys = pad_left(PROMPTS, LENGTH), make_keys()
    options = make_options(Denoising(), max_new_tokens=5)
    (drawn,) = sample_answers(CONFIG, params, prompts, keys, options)
    ((logprobs, *_),) = score_answers(CONFIG, params, prompts, (drawn,), LogprobOptions(SPECIAL))
    kept = np.asarray(drawn.mask)
    assert kept.any() and drawn.logprobs is not None
    np.testing.assert_allclose(logprobs[kept], drawn.logprobs[kept], atol=LOGPROBS)
