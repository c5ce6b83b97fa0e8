"""Images drawn in windows of codes against those drawn code by code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.policies import decoding, jacobi
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus import sampling
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
