"""Given images are cut as the family does; those of questions become codes once."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.data import images
from corl_jax.policies import FAMILIES
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.logprobs import score_answers
from corl_jax.policies.show_o.prompts import ImageSettings, preprocess_image
from corl_jax.policies.show_o.reading import fill_codes
from corl_jax.tasks import TEXT
from corl_jax.train.image_codes import fit_pixels, read_images, reads_codes
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Segment
from tests.support.tiny_models import tiny_image
from tests.support.tiny_show_o import CONFIG, SPECIAL, make_params

ROWS = 3


@pytest.fixture(scope="module")
def params():
    return make_params()


def make_batch() -> dict[str, TaskBatch]:
    """Questions and captions about the same images, and a text without an image."""
    draw = np.random.default_rng(0)
    side = CONFIG.magvit.downsample * round(CONFIG.num_image_tokens**0.5)
    pixels = jnp.asarray(draw.uniform(-1, 1, (ROWS, side, side, 3)), jnp.float32)
    image = [SPECIAL.mmu, SPECIAL.soi, *[SPECIAL.mask] * CONFIG.num_image_tokens, SPECIAL.eoi]
    tokens = jnp.asarray(draw.integers(1, 20, (ROWS, 4)), jnp.int32)
    answers = Segment(TEXT, tokens, tokens > 0)

    def complete(row: list[int], of_image: jax.Array | None) -> TaskBatch:
        ids = jnp.asarray([row] * ROWS, jnp.int32)
        return TaskBatch(EncodedPrompts(ids, ids != SPECIAL.pad, of_image), (answers,))

    return {
        "mm2t": complete([SPECIAL.pad, *image, SPECIAL.eos, 5, 6], pixels),
        "caption": complete([*image, SPECIAL.eos, 7], pixels),
        "plain_text": complete([SPECIAL.eos], None),
    }


def make_run(family) -> Any:
    processor = types.SimpleNamespace(special=SPECIAL)
    return types.SimpleNamespace(family=family, sizes=CONFIG, processor=processor)


def test_questions_and_captions_read_the_same_codes_and_score_the_same(params):
    show_o, coded = FAMILIES["show_o"], []

    def encode(sizes, params, pixels):
        coded.append(pixels)
        return show_o.encode_images(sizes, params, pixels)

    batch = make_batch()
    family = dataclasses.replace(show_o, encode_images=encode)
    found = read_images(make_run(family), params, batch)
    assert len(coded) == 1, "the images of questions are those of captions"
    assert found["plain_text"] is batch["plain_text"]
    model, options = network.bind(CONFIG, params), LogprobOptions(SPECIAL, chunk=50)
    for name in ("mm2t", "caption"):
        before, after = batch[name], found[name]
        assert after.prompts.pixel_values is None
        np.testing.assert_array_equal(
            after.prompts.input_ids, fill_codes(model, before.prompts, SPECIAL)
        )
        expected, scores = (
            score_answers(CONFIG, params, part.prompts, part.segments, options)[0][0]
            for part in (before, after)
        )
        np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_family_with_an_image_network_of_its_own_keeps_the_pixels(params):
    batch = make_batch()
    assert read_images(make_run(FAMILIES["janus"]), params, batch) is batch


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (90, 33), (41, 40)])
def test_an_image_to_draw_has_the_codes_of_the_same_image_in_a_question(size):
    """The original cuts both in one way; see `prompts.cut_square`."""
    family, image = FAMILIES["show_o"], tiny_image(0, size)
    run: Any = types.SimpleNamespace(family=family, image_side=16)
    pixels = fit_pixels(run, [image, image])
    np.testing.assert_array_equal(pixels, [preprocess_image(image, ImageSettings(16, 16))] * 2)
    run = types.SimpleNamespace(family=FAMILIES["janus"], image_side=16)
    np.testing.assert_array_equal(fit_pixels(run, [image]), images.fit_pixels([image], 16))


def test_models_that_read_pixels_have_no_codes_in_their_questions():
    """A plan compiles the network that training runs: with the tower that reads pixels."""
    with_tower = dataclasses.replace(CONFIG, w_clip_vit=True)
    assert reads_codes(FAMILIES["show_o"], CONFIG)
    assert not reads_codes(FAMILIES["show_o"], with_tower)
    assert not reads_codes(FAMILIES["janus"], CONFIG)
