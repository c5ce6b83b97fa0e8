"""Codes drawn in windows against codes drawn one by one, and their exact distribution."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from corl_jax.policies.choices import Choice, token_logprobs
from corl_jax.policies.jacobi import draw_in_windows

CODES, LENGTH = 3, 5
# Logits of a code after the two before it: [places, code before last, last code, codes].
TABLE = jnp.asarray(
    1.5 * np.random.default_rng(0).standard_normal((LENGTH, CODES, CODES, CODES)), jnp.float32
)


def logits_at(places: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
    """Places behind the end have those of the last one, which nobody needs."""
    return TABLE[jnp.minimum(places, LENGTH - 1), before, last]


def draw_code(choice: Choice, keys, logits, numbers):
    code = choice.draw(keys, numbers, logits)
    return code, token_logprobs(logits, code)


@functools.partial(jax.jit, static_argnames=("window", "greedy", "greedy_last"))
def draw(keys: jax.Array, window: int, greedy: bool = False, greedy_last: int = 0):
    """All codes, their log-probs and the passes of each row; the codes read are the cache."""
    draw_one = functools.partial(draw_code, Choice(1.0, greedy, greedy_last=greedy_last), keys)
    zeros = jnp.zeros(len(keys), jnp.int32)
    first = draw_one(logits_at(zeros, zeros, zeros), jnp.int32(0))

    def read(codes, number, cache):
        put = jax.vmap(lambda row, x, start: lax.dynamic_update_slice_in_dim(row, x, start, 0))
        cache = put(cache, codes, number)
        places = number[:, None] + jnp.arange(window)
        # A cache that begins with one code 0 more: the code before last is at the same place.
        shifted = jnp.pad(cache, ((0, 0), (1, 0)))
        last, before = (jnp.take_along_axis(x, places, axis=1) for x in (cache, shifted))
        return logits_at(places + 1, before, last), cache

    state = draw_in_windows(
        jax.vmap(draw_one, in_axes=1, out_axes=1), read, first, LENGTH, window,
        jnp.full((len(keys), LENGTH + window - 1), 7, jnp.int32),
    )  # fmt: skip
    return state.codes[:, :LENGTH], state.logprobs[:, :LENGTH], state.passes


@functools.partial(jax.jit, static_argnames=("greedy", "greedy_last"))
def draw_one_by_one(keys: jax.Array, greedy: bool = False, greedy_last: int = 0):
    choice = Choice(1.0, greedy, greedy_last=greedy_last)
    last = before = jnp.zeros(len(keys), jnp.int32)
    drawn = []
    for place in range(LENGTH):
        logits = logits_at(jnp.full_like(last, place), before, last)
        drawn.append(draw_code(choice, keys, logits, jnp.int32(place)))
        before, last = last, drawn[-1][0]
    return tuple(jnp.stack(x, axis=1) for x in zip(*drawn, strict=True))


def list_probabilities() -> np.ndarray:
    """The exact probabilities of all CODES ** LENGTH images, in the order of their numbers."""
    logprobs = np.asarray(jax.nn.log_softmax(TABLE), np.float64)
    probabilities = []
    for image in itertools.product(range(CODES), repeat=LENGTH):
        codes = (0, 0, *image)
        terms = (logprobs[t, codes[t], codes[t + 1], codes[t + 2]] for t in range(LENGTH))
        probabilities.append(np.exp(sum(terms)))
    return np.array(probabilities)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"greedy_last": 4}], ids=str)
def test_windows_draw_the_codes_that_are_drawn_one_by_one(window, options):
    keys = jax.random.split(jax.random.key(1), 400)
    codes, logprobs, passes = draw(keys, window, **options)
    expected_codes, expected_logprobs = draw_one_by_one(keys, **options)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-6)
    # The first code needs no pass, and each pass makes at least one and at most W codes final.
    assert (passes <= LENGTH - 1).all() and (passes * window >= LENGTH - 1).all()
    # Greedy rows are all the same, and their guesses may be all wrong.
    assert window == 1 or options == {"greedy": True} or passes.mean() < LENGTH - 1.3


@pytest.mark.parametrize("window", [2, 4])
def test_every_image_has_its_exact_probability(window):
    """All 243 images are counted: none is rarer or more frequent for being easy to guess."""
    count = 60_000
    codes, _, passes = draw(jax.random.split(jax.random.key(2), count), window)
    numbers = np.asarray(codes) @ CODES ** np.arange(LENGTH)[::-1]
    probabilities = list_probabilities()
    assert abs(probabilities.sum() - 1) < 1e-6
    often = count * probabilities >= 5
    observed = np.bincount(numbers, minlength=len(probabilities))
    # The rare ones count as one image, so that the statistic is that of chi-square.
    counts = [np.append(x[often], x[~often].sum()) for x in (observed, count * probabilities)]
    assert stats.chisquare(*counts, sum_check=False).pvalue > 1e-3
    # Of the images that took few passes alone the same would be false.
    fast = np.asarray(passes) == np.asarray(passes).min()
    biased = np.bincount(numbers[fast], minlength=len(probabilities))[often]
    expected = probabilities[often] / probabilities[often].sum() * biased.sum()
    assert stats.chisquare(biased, expected).pvalue < 1e-9


def test_a_row_does_not_depend_on_the_others():
    keys = jax.random.split(jax.random.key(3), 8)
    codes, _, passes = draw(keys, 4)
    alone, _, passes_alone = draw(keys[5:6], 4)
    np.testing.assert_array_equal(codes[5:6], alone)
    np.testing.assert_array_equal(passes[5:6], passes_alone)
