"""Plans and the images after them: against the original loop, in other company, and scored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.trajectory import draw_noise
from corl_jax.algorithms.flow.windows import Window
from corl_jax.devices.mesh import batch_sharding, make_mesh
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.completions import fold_image_keys
from corl_jax.policies.family import Denoising, LogprobOptions, SamplingOptions
from corl_jax.policies.janus_flow import network, thinking
from corl_jax.policies.janus_flow.layout import RULES
from corl_jax.tasks import LATENTS, TEXT
from tests.parity import torch_janus_flow
from tests.support import tiny_flow
from tests.support.tiny_flow import CONFIG, SPECIAL, pad_left
from tests.support.tiny_runs import place_params
from tests.support.tolerances import LOGPROBS

PROMPTS = ([1, 5, 6, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37])
LENGTH, GROUP, COUNT, NEW_TOKENS = 10, 3, 3, 7
NOISY = Denoising(COUNT, sde=Sde("flow"), window=Window(2, (0, 1)))
OPTIONS = SamplingOptions(
    SPECIAL, temperature=0.8, max_new_tokens=NEW_TOKENS, cfg_scale=2.0, dtype=jnp.float32,
    attention="xla", denoising=NOISY,
)  # fmt: skip
RATIO = 1e-5
"""Largest |ratio - 1| of a step that is scored with the weights that drew it."""

pytestmark = pytest.mark.usefixtures("exact_products")


def raise_end(params: dict[str, Any]) -> dict[str, Any]:
    """Lets plans end at very different lengths, and some not at all."""
    kernel = params["lm_head"]["kernel"].copy()
    kernel[:, SPECIAL.eos] *= 6
    return params | {"lm_head": {"kernel": kernel}}


@pytest.fixture(scope="module")
def params():
    return raise_end(tiny_flow.make_params())


def make_keys(group: int = GROUP, index: Any = (0, 1)) -> jax.Array:
    return sample_keys(5, np.asarray(index), group)


def sample(config, params, keys, rows=PROMPTS, length=LENGTH, **changes: Any) -> Any:
    options = dataclasses.replace(OPTIONS, **changes)
    return thinking.sample_thinking(config, params, pad_left(rows, length), keys, options)


@pytest.fixture(scope="module")
def drawn(params):
    with jax.default_matmul_precision("highest"):
        return sample(CONFIG, params, make_keys())


def make_scoring(**changes: Any) -> LogprobOptions:
    changes = {"temperature": 0.8, "cfg_scale": 2.0, "denoising": NOISY} | changes
    return LogprobOptions(SPECIAL, **changes)


@functools.partial(jax.jit, static_argnames="options")
def score(params, prompts, segments, options):
    return thinking.score_thinking(CONFIG, params, prompts, segments, options)


def list_plans(text) -> list[list[int]]:
    """The tokens that each image is drawn after."""
    rows = [np.asarray(text.values)[i][mask] for i, mask in enumerate(np.asarray(text.mask))]
    return [[int(token) for token in row if token != SPECIAL.eos] for row in rows]


def test_plans_are_of_many_lengths_and_images_differ(drawn):
    text, latents = drawn
    assert (text.kind, latents.kind) == (TEXT, LATENTS)
    lengths = [len(plan) for plan in list_plans(text)]
    assert len({*lengths}) >= 3 and max(lengths) == NEW_TOKENS, lengths
    assert (np.asarray(text.values)[~np.asarray(text.mask)] == SPECIAL.eos).all()
    images = np.asarray(latents.values[:, -1]).reshape(len(lengths), -1)
    assert len(np.unique(images.round(3), axis=0)) == len(images)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_images_equal_the_original_loop_behind_the_written_out_plan(scale):
    """Prompt and plan as one text, one row at a time."""
    reference = torch_janus_flow.tiny_flow()
    config, keys = torch_janus_flow.jax_config(reference), make_keys()
    params = raise_end(torch_janus_flow.flow_params(reference))
    text, latents = sample(config, params, keys, cfg_scale=scale, denoising=Denoising(COUNT))
    plans = list_plans(text)
    assert len({len(plan) for plan in plans}) >= 3 and latents.logprobs is None
    starts = np.array(draw_noise(fold_image_keys(keys), config.latent_shape))
    for i, (plan, start) in enumerate(zip(plans, starts, strict=True)):
        z = torch.from_numpy(start).permute(2, 0, 1)[None]
        ids = [*PROMPTS[i // GROUP], *plan]
        for number in range(COUNT):
            with torch.no_grad():
                conditional = reference.velocity(z, number / COUNT, ids)
                blank = reference.velocity(z, number / COUNT, ids, hidden=True)
            z = z + (scale * conditional - (scale - 1) * blank) / COUNT
        expected = z[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(latents.values[i, 0], expected, atol=LOGPROBS, err_msg=str(i))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_scoring_computes_what_the_sampler_recorded(params, scale):
    """Both segments in one pass, however many images are scored at once."""
    segments = sample(CONFIG, params, make_keys(), cfg_scale=scale)
    # Not even a loss that leaves a plan out may change what its image was drawn after.
    hidden = dataclasses.replace(segments[0], mask=jnp.zeros_like(segments[0].mask))
    options, prompts = make_scoring(cfg_scale=scale), pad_left(PROMPTS, LENGTH)
    (text, entropies), (steps, none, velocities) = score(
        params, prompts, (hidden, segments[1]), options
    )
    kept, recorded = np.asarray(segments[0].mask), [x.logprobs for x in segments]
    np.testing.assert_allclose(text[kept], recorded[0][kept], atol=LOGPROBS)
    assert (np.asarray(entropies)[kept] > 0).all() and none is None
    ratios = np.exp(steps - recorded[1])
    print(f"scale {scale:g}: largest |ratio - 1| {np.abs(ratios - 1).max():.1e}")
    assert np.abs(ratios - 1).max() < RATIO
    assert velocities.shape == (*steps.shape, *CONFIG.latent_shape)
    for i in range(len(PROMPTS)):  # one prompt at a time
        rows = slice(i * GROUP, (i + 1) * GROUP)
        part = jax.tree.map(lambda x: x[rows], segments)  # noqa: B023
        (alone, _), (alone_steps, *_) = score(
            params, jax.tree.map(lambda x: x[i : i + 1], prompts), part, options  # noqa: B023
        )  # fmt: skip
        np.testing.assert_allclose(alone_steps, steps[rows], atol=RATIO)
        np.testing.assert_allclose(alone[kept[rows]], text[rows][kept[rows]], atol=LOGPROBS)


def test_a_sample_depends_on_its_key_and_prompt_alone(params, drawn):
    alone = sample(CONFIG, params, make_keys(index=[1]), PROMPTS[1:], length=12)
    longer = sample(CONFIG, params, make_keys(), max_new_tokens=NEW_TOKENS + 9)
    ended = (np.asarray(drawn[0].values) == SPECIAL.eos).any(-1)
    assert ended.any() and not ended.all()
    for found, rows in ((alone, slice(GROUP, None)), (longer, ended)):
        kept = rows if found is longer else slice(None)
        plans, expected = (
            np.asarray(x[0].values)[chosen][:, :NEW_TOKENS]
            for x, chosen in ((found, kept), (drawn, rows))
        )
        np.testing.assert_array_equal(plans, expected)
        images, expected = np.asarray(found[1].values)[kept], np.asarray(drawn[1].values)[rows]
        np.testing.assert_allclose(images, expected, atol=LOGPROBS)


def test_guidance_changes_images_and_no_plan(params, drawn):
    plain = sample(CONFIG, params, make_keys(), cfg_scale=1.0)
    np.testing.assert_array_equal(plain[0].values, drawn[0].values)
    assert (np.asarray(plain[1].values[:, -1]) != np.asarray(drawn[1].values[:, -1])).any()


def test_a_plan_gets_gradients_from_its_image(params, drawn):
    """Through the states that the image attends to: its words' embeddings have a gradient."""

    def loss(table):
        inner = params["language_model"] | {"embed_tokens": {"embedding": table}}
        scored = thinking.score_thinking(
            CONFIG, params | {"language_model": inner}, pad_left(PROMPTS, LENGTH), drawn,
            make_scoring(),
        )  # fmt: skip
        return scored[1][0].sum()

    table = params["language_model"]["embed_tokens"]["embedding"]
    gradient = np.abs(np.asarray(jax.jit(jax.grad(loss))(table))).max(axis=1)
    written = {token for plan in list_plans(drawn[0]) for token in plan}
    assert len(written) > 5 and np.isfinite(gradient).all()
    # The end of a plan is predicted but not read, as nothing else that was left out.
    assert {*np.flatnonzero(gradient).tolist()} == {*PROMPTS[0], *PROMPTS[1], *written}


def test_one_token_of_a_plan_is_enough(params):
    segments = sample(CONFIG, params, make_keys(), max_new_tokens=1)
    text, steps = score(params, pad_left(PROMPTS, LENGTH), segments, make_scoring())
    np.testing.assert_allclose(text[0], segments[0].logprobs, atol=LOGPROBS)
    np.testing.assert_allclose(steps[0], segments[1].logprobs, atol=RATIO)


def test_scoring_lowers_to_cudnn_for_nvidia(params, drawn, monkeypatch):
    """With plans and images of odd lengths; cuDNN attends over even ones alone."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    assert NEW_TOKENS % 2 and CONFIG.num_image_tokens % 2 == 0  # and the token of the time
    options, prompts = make_scoring(attention="cudnn"), pad_left(PROMPTS, LENGTH)

    def loss(params):
        rounded = network.cast(params, jnp.bfloat16)
        scored = thinking.score_thinking(CONFIG, rounded, prompts, drawn, options)
        return sum(logprobs.sum() for logprobs, *_ in scored)

    traced = jax.jit(jax.grad(loss)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    for direction in ("Softmax(", "SoftmaxBackward("):
        # Prompt, plan and image; BOS and the image without them.
        assert sum(direction in line for line in lines) >= 5, direction


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes(params):
    """Samples, and the scores of both segments."""
    rows = [[1, *range(5, 5 + count)] for count in (2, 5, 3, 7, 4, 1, 6, 8)]
    prompts, keys = pad_left(rows, LENGTH), make_keys(2, range(8))

    @jax.jit
    def measure(params, prompts, keys):
        segments = thinking.sample_thinking(CONFIG, params, prompts, keys, OPTIONS)
        return segments, [
            scores[0]
            for scores in thinking.score_thinking(CONFIG, params, prompts, segments, make_scoring())
        ]

    expected = jax.device_get(measure(params, prompts, keys))
    mesh = make_mesh(2, 2, 2)
    spread = jax.device_put((prompts, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.device_get(measure(place_params(params, mesh, RULES), *spread))
    np.testing.assert_array_equal(found[0][0].values, expected[0][0].values)
    np.testing.assert_allclose(found[0][1].values, expected[0][1].values, atol=5 * LOGPROBS)
    kept = expected[0][0].mask
    np.testing.assert_allclose(found[1][0][kept], expected[1][0][kept], atol=5 * LOGPROBS)
    np.testing.assert_allclose(found[1][1], expected[1][1], atol=5 * RATIO)
