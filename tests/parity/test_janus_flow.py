"""JanusFlow against torch, on tiny random float32 weights.

The promise is 1e-4 for velocities and 1e-3 for logits. Measured differences are some 1e-6.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.models import uvit
from corl_jax.params import flatten
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import network
from corl_jax.types import EncodedPrompts
from tests.parity import torch_janus_flow
from tests.support.tolerances import NETWORK

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PROMPTS = ([1, 5, 6, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37])
LENGTH, GROUP = 12, 3  # places of a padded prompt; noises of each prompt
TIMES = (1.0, 0.7, 0.05)  # 1 is noise
IMAGE = 16  # tokens


@pytest.fixture(scope="module", params=["plain", "grouped queries"])
def pair(request):
    sizes = {"num_key_value_heads": 2} if request.param != "plain" else {}
    model = torch_janus_flow.tiny_flow(len(sizes), **sizes)
    config = torch_janus_flow.jax_config(model)
    return SimpleNamespace(torch=model, config=config, params=torch_janus_flow.flow_params(model))


def ours(pair, function, *arguments):
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(lambda params, *rest: function(network.bind(pair.config, params), *rest))
        return jax.tree.map(np.asarray, compiled(pair.params, *arguments))


def assert_close(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.1, f"{what}: values so small that any output would pass"
    error = np.abs(found - expected).max()
    print(f"parity {what}: largest difference {error:.1e} (std {expected.std():.2f})")
    assert error <= NETWORK, f"{what}: {error:.2e} > {NETWORK:.0e}"


def pad_left(rows, length: int = LENGTH) -> EncodedPrompts:
    ids = np.full((len(rows), length), SPECIAL.pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    return EncodedPrompts(ids, mask)


def draw_latents(pair) -> tuple[np.ndarray, np.ndarray]:
    """Noises of all prompts at all times, prompt-major: [6, h, w, C] and [6]."""
    rows = len(PROMPTS) * GROUP
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(rows, *pair.config.latent_shape)).astype(np.float32)
    return latents, np.tile(np.float32(TIMES), len(PROMPTS))


def compute_theirs(pair, latents, times, hidden: bool) -> np.ndarray:
    """Our velocities by torch, one row at a time: their negative, at the time 1 - t."""
    out = []
    for i, (latent, time) in enumerate(zip(latents, times, strict=True)):
        z = torch.from_numpy(latent).permute(2, 0, 1)[None]
        with torch.no_grad():
            velocity = pair.torch.velocity(z, 1 - float(time), PROMPTS[i // GROUP], hidden)
        out.append(-velocity[0].permute(1, 2, 0).numpy())
    return np.stack(out)


def make_prefix(model, branch: str, prompts: EncodedPrompts) -> network.Prefix:
    if branch == "conditional":
        return model.make_prefix(prompts, SPECIAL)
    return model.make_blank_prefix(prompts.attention_mask.sum(-1), SPECIAL)


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_velocities_of_several_noises_and_times_of_padded_prompts(pair, branch):
    latents, times = draw_latents(pair)
    theirs = compute_theirs(pair, latents, times, branch == "unconditional")

    def at_once(model, latents, times, prompts):
        return model.velocity(latents, times, make_prefix(model, branch, prompts), remat="full")

    def prefilled(model, latents, times, prompts):
        prefix = make_prefix(model, branch, prompts)
        caches = model.prefill(prefix)
        return model.velocity_after(latents, times, prefix, caches)

    for function in (at_once, prefilled):
        velocity = ours(pair, function, latents, times, pad_left(PROMPTS))
        assert velocity.dtype == np.float32
        assert_close(f"{branch} velocity, {function.__name__}", velocity, theirs)


def test_the_branches_and_the_hidden_positions_differ(pair):
    """A mistake in the prompt or in the first position would be seen above."""
    latents, times = draw_latents(pair)

    def run(model, latents, times, prompts):
        blank = make_prefix(model, "unconditional", prompts)
        moved = blank._replace(first=jnp.ones_like(blank.first))
        prefixes = (model.make_prefix(prompts, SPECIAL), blank, moved)
        return [model.velocity(latents, times, prefix) for prefix in prefixes]

    conditional, blank, moved = ours(pair, run, latents, times, pad_left(PROMPTS))
    assert np.abs(conditional - blank).max() > 0.1
    assert np.abs(moved - blank).max() > 0.01


@pytest.mark.parametrize("images", [1, 2])
def test_logits_of_questions_with_the_embedding_of_boi_replaced(pair, images):
    one = [SPECIAL.boi, *[SPECIAL.image] * IMAGE, SPECIAL.eoi]
    rows = [[1, 11, *one * images, 12], [1, 21, 22, 23, 24, *one * images, 25, 26]]
    size = pair.config.siglip.image_size
    pixels = np.random.default_rng(1).normal(size=(2, images, size, size, 3)).astype(np.float32)
    prompts = pad_left(rows, 48)

    def run(model, prompts, pixels):
        features = model.image_features(pixels)
        embeds = model.prompt_embeds(prompts.input_ids, SPECIAL, features)
        return model.text_logits(model.language_model(embeds, prompts.attention_mask))

    found = ours(pair, run, prompts, pixels if images > 1 else pixels[:, 0])
    for i, row in enumerate(rows):
        places = [j for j, token in enumerate(row) if token in (SPECIAL.boi, SPECIAL.image)]
        assert len(places) == images * (IMAGE + 1)
        with torch.no_grad():
            stack = torch.from_numpy(pixels[i]).permute(0, 3, 1, 2)
            expected = pair.torch.logits(row, places, stack)[0].numpy()
        assert_close(f"logits of {images} images", found[i, -len(row) :], expected)


def test_the_embedding_of_boi_gets_no_gradient(pair):
    pixels = np.ones((1, 16, 16, 3), np.float32)

    def loss(params):
        return network.bind(pair.config, params).image_features(pixels).sum()

    gradients = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(pair.params))
    assert not gradients["begin_embedding"].any()
    assert gradients["aligner"]["bias"].any()


def test_every_weight_of_torch_has_a_place(pair):
    abstract = flatten(network.abstract(pair.config))
    params = flatten(pair.params)
    assert {path: leaf.shape for path, leaf in abstract.items()} == {
        path: leaf.shape for path, leaf in params.items()
    }


def test_features_of_a_time_begin_with_cosines():
    """By hand: width 4 has the frequencies 1 and 1/100."""
    features = uvit.make_time_features(jnp.array([0.0, 500.0]), 4)
    expected = [[1, 1, 0, 0], [np.cos(500), np.cos(5), np.sin(500), np.sin(5)]]
    np.testing.assert_allclose(features, expected, atol=5e-5)


def test_pixels_are_shuffled_as_rows_of_a_patch():
    # One place with channels c * 4 + dy * 2 + dx: channel 0 is [[0, 1], [2, 3]].
    shuffled = uvit.shuffle_pixels(jnp.arange(8.0).reshape(1, 1, 1, 8), 2)
    np.testing.assert_array_equal(shuffled[0, :, :, 0], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(shuffled[0, :, :, 1], [[4, 5], [6, 7]])


def test_a_dead_channel_has_finite_gradients():
    norm = uvit.GlobalResponseNorm(3)
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    gradient = jax.grad(lambda x: norm(x).sum())(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_depthwise_convolution_is_that_of_xla(dtype):
    """Its values and its own gradients equal those of the plain convolution."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights = (jax.random.normal(key, (3, 5, 4, 6), dtype) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (7, 7, 1, 6), dtype)

    def convolve_plainly(x, kernel):
        return jax.lax.conv_general_dilated(
            *(y.astype(jnp.float32) for y in (x, kernel)), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6,
        )  # fmt: skip

    def compute(convolve):
        def loss(*inputs):
            result = convolve(*inputs)
            return (result.astype(jnp.float32) * weights).sum(), result

        gradients, result = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
        return *gradients, result

    atol = NETWORK if dtype == jnp.float32 else 0.1  # of values up to 20, rounded to 8 bits
    with jax.default_matmul_precision("highest"):
        for found, expected in zip(
            compute(uvit.convolve_depthwise), compute(convolve_plainly), strict=True
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(
                *(y.astype(np.float32) for y in (found, expected)), atol=atol
            )
