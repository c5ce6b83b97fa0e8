"""The trained nano draws images in windows: their distribution, and its log-probs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from corl_jax.assets import NANO_JANUS
from corl_jax.policies import load_policy
from corl_jax.policies.choices import guide, sample_keys
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.logprobs import compute_code_states
from corl_jax.tasks import IMAGE_GENERATION
from tests.support.tolerances import LOGPROBS

TEXTS = ("a red circle", "two blue squares")
GROUP, BINS = 128, 20


@pytest.fixture(scope="module")
def nano():
    return load_policy(NANO_JANUS, dtype=jnp.float32)


@pytest.fixture(scope="module")
def prompts(nano):
    kind = IMAGE_GENERATION.turn.prompt
    ids = [nano.processor.prompt_ids(kind, {"prompt": text}) for text in TEXTS]
    return nano.processor.encode(kind, ids)


def compute_logprobs(nano, prompts, codes: jax.Array, cfg_scale: float) -> np.ndarray:
    """The log-probs [N, T, V] of all codes, of which images were drawn, from one full forward."""
    options = LogprobOptions(nano.processor.special, image_logprobs="guided", remat="none")

    @jax.jit
    def compute(params):
        model = network.bind(nano.sizes, params)
        states = compute_code_states(model, prompts, codes, options)
        mixed = guide(*(model.image_logits(x).astype(jnp.float32) for x in states), cfg_scale)
        return jax.nn.log_softmax(mixed, axis=-1)

    return np.asarray(compute(nano.params), np.float64)


def draw_uniforms(logprobs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """A number of each code that is uniform in [0, 1] if the code was drawn by these log-probs.

    Small numbers are of likely codes, so that a sampler that prefers what is easy to guess shows.
    """
    # Probabilities 0.5, 0.3, 0.2: the likeliest code is at 0 to 0.5, the second at 0.5 to 0.8.
    probabilities = np.exp(logprobs)
    own = np.take_along_axis(probabilities, codes[..., None], axis=-1)
    likelier = np.where(probabilities > own, probabilities, 0).sum(-1)
    return likelier + own[..., 0] * np.random.default_rng(0).random(codes.shape)


def measure_uniformity(uniforms: np.ndarray) -> float:
    """The p-value of the test that the numbers are uniform."""
    counts, _ = np.histogram(uniforms, bins=BINS, range=(0, 1))
    return stats.chisquare(counts).pvalue


@pytest.mark.parametrize("cfg_scale", [5.0, 1.0])
def test_codes_have_the_distribution_of_the_full_forward(nano, prompts, cfg_scale):
    """Chi-square over 4,096 codes, each under the codes before it; and what is recorded of them."""
    keys = sample_keys(8, np.arange(len(TEXTS)), GROUP)

    def draw(temperature: float):
        return sampling.sample_images(
            nano.sizes, nano.params, prompts, keys, special=nano.processor.special,
            cfg_scale=cfg_scale, temperature=temperature, image_logprobs="guided", window=4,
            dtype=jnp.float32,
        )  # fmt: skip

    drawn, sharper = draw(1.0), draw(0.6)
    logprobs = compute_logprobs(nano, prompts, drawn.values, cfg_scale)
    codes = np.asarray(drawn.values)
    recomputed = np.take_along_axis(logprobs, codes[..., None], axis=-1)[..., 0]
    # Guidance multiplies what rounding does to logits.
    np.testing.assert_allclose(drawn.logprobs, recomputed, atol=5 * LOGPROBS)
    assert measure_uniformity(draw_uniforms(logprobs, codes)) > 1e-3
    # Codes that are a little too likely would show.
    logprobs = compute_logprobs(nano, prompts, sharper.values, cfg_scale)
    assert measure_uniformity(draw_uniforms(logprobs, np.asarray(sharper.values))) < 1e-9
