"""An image and the answer about it: against the two tasks that they are made of."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.devices.mesh import batch_sharding, make_mesh
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import (
    NOISE_KEYS,
    LogprobOptions,
    SamplingOptions,
    StraightThrough,
)
from corl_jax.policies.janus import images, own_images, sampling
from corl_jax.policies.janus.image_settings import ImageSettings, preprocess_image
from corl_jax.policies.janus.layout import RULES
from corl_jax.types import EncodedPrompts
from tests.support.tiny_models import LAYOUTS, divisible, layout_name, two_layers
from tests.support.tiny_runs import SPECIAL, image_batch, place_params, random_params, text_batch
from tests.support.tolerances import LOGPROBS

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP, NEW_TOKENS = 4, 2, 6


@pytest.fixture(scope="module")
def config(tiny_config):
    return divisible(two_layers(tiny_config))


@pytest.fixture(scope="module")
def params(config):
    params = random_params(config)
    params["lm_head"]["kernel"][:, SPECIAL.eos] *= 4  # so that answers end at different lengths
    return params


@pytest.fixture(scope="module")
def settings(config) -> ImageSettings:
    side = config.siglip.image_size
    return ImageSettings(side, config.num_image_tokens, (0.5, 0.4, 0.3), (0.5, 0.25, 0.4))


@pytest.fixture(scope="module")
def prompts(config) -> EncodedPrompts:
    """Left-padded prompts of both turns; the question has no pixels."""
    slots = config.num_image_tokens
    drawing = image_batch(config.vq.num_embeddings, slots, PROMPTS, 1).prompts
    question = text_batch(config.siglip.image_size, slots, PROMPTS, 1).prompts
    return dataclasses.replace(drawing, next=dataclasses.replace(question, pixel_values=None))


KEYS = sample_keys(5, np.arange(PROMPTS), GROUP)


def sampling_options(settings: ImageSettings, **changes) -> SamplingOptions:
    options = SamplingOptions(
        SPECIAL, temperature=0.8, max_new_tokens=NEW_TOKENS, cfg_scale=3.0, dtype=jnp.float32,
        attention="xla", image=settings,
    )  # fmt: skip
    return dataclasses.replace(options, **changes)


def sample(config, params, prompts, settings, keys=KEYS, **changes):
    options = sampling_options(settings, **changes)
    return own_images.sample_own_answers(config, params, prompts, keys, options)


@pytest.fixture(scope="module")
def drawn(config, params, prompts, settings):
    with jax.default_matmul_precision("highest"):
        return sample(config, params, prompts, settings)


def ask_saved_images(config, params, prompts, settings, codes, keys, **changes):
    """The answers of image understanding about the images of codes, as files of 8 bits."""
    pictures = np.asarray(images.decode_images(config, params, codes))
    pixels = np.stack([preprocess_image(Image.fromarray(x), settings) for x in pictures])
    group = len(codes) // len(prompts.input_ids)
    ids, mask = (
        np.repeat(x, group, 0) for x in (prompts.next.input_ids, prompts.next.attention_mask)
    )
    (text,) = sampling.sample_answers(
        config, params, EncodedPrompts(ids, mask, pixels), keys,
        sampling_options(settings, **changes),
    )  # fmt: skip
    return text


def test_images_are_those_of_image_generation_and_answers_those_about_the_saved_images(
    config, params, prompts, settings, drawn
):
    codes, text = drawn
    first = dataclasses.replace(prompts, next=None)
    (alone,) = sampling.sample_codes(config, params, first, KEYS, sampling_options(settings))
    np.testing.assert_array_equal(codes.values, alone.values)
    np.testing.assert_allclose(codes.logprobs, alone.logprobs, atol=LOGPROBS)
    assert len(np.unique(codes.values, axis=0)) == PROMPTS * GROUP
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, own_images.ANSWER_KEYS)
    asked = ask_saved_images(config, params, prompts, settings, codes.values, keys)
    np.testing.assert_array_equal(text.values, asked.values)
    np.testing.assert_array_equal(text.mask, asked.mask)
    assert len({tuple(row) for row in np.asarray(text.values)}) > PROMPTS


def test_the_last_completion_of_each_prompt_can_be_greedy_in_both_turns(
    config, params, prompts, settings, drawn
):
    codes, text = sample(config, params, prompts, settings, greedy_last=True)
    last = np.arange(GROUP - 1, PROMPTS * GROUP, GROUP)
    first = dataclasses.replace(prompts, next=None)
    (greedy,) = sampling.sample_codes(
        config, params, first, KEYS[last], sampling_options(settings, greedy=True)
    )
    np.testing.assert_array_equal(codes.values[last], greedy.values)
    asked = ask_saved_images(
        config, params, prompts, settings, greedy.values, KEYS[last], greedy=True
    )
    np.testing.assert_array_equal(text.values[last], asked.values)
    others = np.delete(np.arange(PROMPTS * GROUP), last)
    np.testing.assert_array_equal(codes.values[others], drawn[0].values[others])
    np.testing.assert_array_equal(text.values[others], drawn[1].values[others])


@functools.partial(jax.jit, static_argnames=("config", "options"))
def score(config, params, prompts, segments, options):
    return own_images.score_own_answers(config, params, prompts, segments, options)


@pytest.mark.parametrize("image_logprobs", ["conditional", "guided"])
def test_sampled_log_probs_are_the_scored_ones(config, params, prompts, settings, image_logprobs):
    segments = sample(config, params, prompts, settings, image_logprobs=image_logprobs)
    options = LogprobOptions(
        SPECIAL, temperature=0.8, cfg_scale=3.0, image_logprobs=image_logprobs, chunk=10_000,
        image=settings,
    )  # fmt: skip
    for segment, (logprobs, entropy) in zip(
        segments, score(config, params, prompts, segments, options), strict=True
    ):
        mask = np.asarray(segment.mask)
        np.testing.assert_allclose(
            np.asarray(segment.logprobs)[mask], np.asarray(logprobs)[mask], atol=1e-3
        )
        assert (np.asarray(entropy)[mask] > 0).all()


@pytest.mark.parametrize("axes", LAYOUTS, ids=layout_name)
def test_eight_devices_draw_and_score_the_same(config, params, prompts, settings, drawn, axes):
    mesh = make_mesh(*axes)
    with jax.set_mesh(mesh):
        placed = place_params(params, mesh, RULES)
        group = 8 // PROMPTS
        keys = sample_keys(5, np.arange(PROMPTS * 2) % PROMPTS, group)
        rows = jax.tree.map(lambda x: np.concatenate([x, x]), prompts)
        rows, keys = jax.device_put((rows, keys), batch_sharding(mesh))
        segments = sample(config, placed, rows, settings, keys)
        options = LogprobOptions(SPECIAL, temperature=0.8, chunk=10_000, image=settings)
        scored = score(config, placed, rows, segments, options)
    for segment, expected, (logprobs, _) in zip(segments, drawn, scored, strict=True):
        twice = np.concatenate([expected.values] * 2)
        np.testing.assert_array_equal(segment.values, twice)
        mask = np.asarray(segment.mask)
        np.testing.assert_allclose(
            np.asarray(segment.logprobs)[mask], np.asarray(logprobs)[mask], atol=1e-3
        )


@functools.partial(jax.jit, static_argnames=("config", "options"))
def differentiate(config, params, prompts, segments, options):
    """The gradient of the answers' log-probs through the images, in all but their tokenizer."""
    trained, frozen = partition(params, ["(?!vqmodel).*"])

    def total(trained):
        whole = merge(trained, frozen)
        _, (logprobs, _) = own_images.score_own_answers(config, whole, prompts, segments, options)
        return jnp.where(segments[1].mask, logprobs, 0.0).sum()

    return jax.grad(total)(trained)


@pytest.mark.slow
def test_eight_devices_have_the_same_gradient_through_images(
    config, params, prompts, settings, drawn
):
    rows, (codes, text) = jax.tree.map(lambda x: np.concatenate([x, x]), (prompts, drawn))
    bits = jax.random.key_data(jax.random.split(jax.random.key(3), len(codes.values)))
    segments = (dataclasses.replace(codes, replay={NOISE_KEYS: np.asarray(bits)}), text)
    options = LogprobOptions(
        SPECIAL, chunk=40, image=settings, straight_through=StraightThrough()
    )  # fmt: skip
    expected = differentiate(config, params, rows, segments, options)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = place_params(params, mesh, RULES)
        inputs = jax.device_put((rows, segments), batch_sharding(mesh))
        found = differentiate(config, placed, *inputs, options)
    assert np.abs(expected["generation_head"]["vision_head"]["kernel"]).max() > 0
    for (path, x), (_, y) in zip(leaf_paths(found), leaf_paths(expected), strict=True):
        y = np.asarray(y)
        largest = max(np.abs(y).max(), 1e-4)
        np.testing.assert_allclose(np.asarray(x) / largest, y / largest, atol=2e-3, err_msg=path)
