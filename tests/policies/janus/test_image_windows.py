"""Images drawn in windows of codes against those drawn code by code."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.policies import decoding, jacobi
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.layout import RULES
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts
from tests.support.tolerances import LOGPROBS

pytestmark = pytest.mark.usefixtures("exact_products")

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PADDING = np.array([2, 0])
GROUP, LENGTH = 3, 7


def make_prompts() -> EncodedPrompts:
    """[BOS, text, BOI], left-padded by PADDING."""
    ids = np.random.default_rng(3).integers(3, 90, (len(PADDING), LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) >= PADDING[:, None]
    ids[~mask] = SPECIAL.pad
    ids[np.arange(len(ids)), PADDING] = SPECIAL.bos
    ids[:, -1] = SPECIAL.boi
    return EncodedPrompts(ids, mask)


def draw_images(config, params, prompts, keys, **options):
    options = {"cfg_scale": 3.0, "temperature": 0.8, "image_logprobs": "guided", **options}
    return sampling.sample_images(
        config, params, prompts, keys, special=SPECIAL, dtype=jnp.float32, **options
    )


@pytest.fixture
def passes(monkeypatch):
    """The passes of the rows of a sampler that is compiled in the test."""
    counts, draw_in_windows = [], jacobi.draw_in_windows

    def counted(*args):
        state = draw_in_windows(*args)
        jax.debug.callback(lambda passes: counts.append(np.asarray(passes)), state.passes)
        return state

    monkeypatch.setattr(sampling, "draw_in_windows", counted)
    jax.clear_caches()
    yield counts
    jax.clear_caches()


@pytest.mark.parametrize(
    ("window", "copied", "options"),
    [
        (2, False, {}),
        (4, True, {}),
        (4, False, {"cfg_scale": 1.0}),
        (5, True, {"greedy_last": True}),
    ],
    ids=str,
)
def test_windows_change_no_image(
    window, copied, options, tiny_config, tiny_params, monkeypatch, passes
):
    """With prompts kept once and with copied ones; rows are at other places of their images."""
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: copied)
    prompts, keys = make_prompts(), sample_keys(5, np.arange(len(PADDING)), GROUP)
    expected = draw_images(tiny_config, tiny_params, prompts, keys, **options)
    assert not passes
    drawn = draw_images(tiny_config, tiny_params, prompts, keys, window=window, **options)
    np.testing.assert_array_equal(drawn.values, expected.values)
    # Guidance multiplies what rounding does to logits.
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, atol=5 * LOGPROBS)
    jax.effects_barrier()
    (counts,) = passes
    steps = tiny_config.num_image_tokens - 1
    assert (counts <= steps).all() and counts.min() < steps, counts


def test_an_image_alone_is_the_one_in_the_batch(tiny_config, tiny_params):
    prompts, keys = make_prompts(), sample_keys(5, np.arange(len(PADDING)), GROUP)
    together = draw_images(tiny_config, tiny_params, prompts, keys, window=4)
    alone = jax.tree.map(lambda x: x[1:], prompts)
    drawn = draw_images(tiny_config, tiny_params, alone, keys[GROUP:], window=4)
    np.testing.assert_array_equal(drawn.values, together.values[GROUP:])
    np.testing.assert_allclose(drawn.logprobs, together.logprobs[GROUP:], atol=5 * LOGPROBS)


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 1, "fsdp": 2, "tensor": 2}], ids=str)
def test_devices_change_no_image(axes, tiny_config, tiny_params):
    """Rows of different devices need different numbers of passes; all wait for the last one."""
    prompts, keys = make_prompts(), sample_keys(5, np.arange(len(PADDING)), GROUP)
    expected = draw_images(tiny_config, tiny_params, prompts, keys, window=4)
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny_params, param_shardings(tiny_params, mesh, RULES))
        placed = jax.device_put((prompts, keys), batch_sharding(mesh))
        drawn = draw_images(tiny_config, params, *placed, window=4)
    np.testing.assert_array_equal(drawn.values, expected.values)
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, atol=5 * LOGPROBS)


def test_data_parallel_windows_need_hardly_any_communication(tiny_config, tiny_params):
    """Whether all images are complete is the one thing that devices tell each other."""
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    arguments = make_prompts(), sample_keys(5, np.arange(len(PADDING)), GROUP)
    with jax.set_mesh(mesh):
        placed = jax.device_put(arguments, batch_sharding(mesh))
        params = jax.device_put(tiny_params, param_shardings(tiny_params, mesh, RULES))

        def draw(params, prompts, keys):
            return draw_images(tiny_config, params, prompts, keys, window=4).values

        text = jax.jit(draw).lower(params, *placed).compile().as_text()
    collectives = re.findall(
        r" (all-(?:gather|reduce|to-all)|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    assert set(collectives) <= {"all-reduce"} and len(collectives) <= 2, collectives
