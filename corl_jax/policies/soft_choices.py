"""Relaxes the choice of image codes, so that a gradient can flow into it (straight-through Gumbel).

The codes were sampled. The states that score them give the logits z of every place. Their relaxed
choice y = softmax(s / tau) has the gradient, and the sampled codes give the value:

    h + y - stop_gradient(y)  ->  vectors of the codes

The scores s are Gumbel noise of which the sampled code is the winner, so that y belongs to the
image that was really drawn. With `redraw` the noise is fresh, and another image is drawn.

Source: showlab/UniRL (arXiv 2505.23380) eq. 3; posterior noise: Maddison et al. 2014
(arXiv 1411.0030), truncated Gumbels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.policies.chunked_logprobs import map_chunks
from corl_jax.policies.family import LogprobOptions

Noise = tuple[jax.Array, jax.Array]
"""Gumbel(0, 1): of the winner [N, T], of every code [N, T, K]."""


def draw_noise(keys: jax.Array, places: jax.Array, num_codes: int) -> Noise:
    """Draws the noise of some places [T] of the images of keys [N]."""

    def draw(key: jax.Array, place: jax.Array) -> Noise:
        of_winner, of_all = jax.random.split(jax.random.fold_in(key, place))
        return jax.random.gumbel(of_winner), jax.random.gumbel(of_all, (num_codes,))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, places)


def score_codes(
    logits: jax.Array, codes: jax.Array, noise: Noise, redraw: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores [N, T, K] of all codes, and the codes [N, T] with the highest ones.

    Without `redraw` these are the given codes: the scores are drawn given that they win.
    """
    of_winner, of_all = noise
    perturbed = logits + of_all
    if redraw:
        return perturbed, jnp.argmax(perturbed, axis=-1).astype(jnp.int32)
    # The maximum of all scores is a Gumbel variable around logsumexp, whoever wins. The others
    # are Gumbel variables below it: -log(e^-T + e^-x) < T.
    top = (jax.nn.logsumexp(logits, axis=-1) + of_winner)[..., None]
    others = -jnp.logaddexp(-top, -perturbed)
    is_winner = jnp.arange(logits.shape[-1]) == codes[..., None]
    return jnp.where(is_winner, top, others), codes


def choose_vectors(
    logits_of: Callable[[Any], jax.Array],
    book: jax.Array,
    states: Any,
    codes: jax.Array,
    keys: jax.Array,
    options: LogprobOptions,
    is_soft: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns vectors [N, T, E] of codes with the relaxed gradient, and the chosen codes [N, T].

    `book` [K, E] has the vectors of all codes. `states` are an array [N, T, D] or a tuple of such
    arrays, of which `logits_of` makes logits; `options.chunk` tokens have logits at once. Where
    `is_soft` [N, T] is False, the code stays and has no relaxed gradient.
    """
    through, book = options.straight_through, book.astype(jnp.float32)
    assert through is not None  # the stage is one with gradients through images
    is_soft = jnp.ones(codes.shape, bool) if is_soft is None else is_soft

    def choose(piece: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, given, soft, places = piece
        logits = logits_of(hidden).astype(jnp.float32)
        noise = draw_noise(keys, places[0], logits.shape[-1])
        scores, chosen = score_codes(logits, given, noise, through.redraw)
        chosen = jnp.where(soft, chosen, given)
        relaxed = jax.nn.softmax(scores / through.temperature, axis=-1) * soft[..., None]
        # Equal to (h + y - stop_gradient(y)) @ book, without the one-hots h.
        return pass_gradient(book[chosen], relaxed @ lax.stop_gradient(book)), chosen

    places = jnp.broadcast_to(jnp.arange(codes.shape[1]), codes.shape)
    return map_chunks(choose, (states, codes, is_soft, places), options.chunk)


def pass_gradient(value: jax.Array, soft: jax.Array) -> jax.Array:
    """Returns `value` to the bit, with the gradient of `soft` beside its own."""
    # In another order, value + soft - soft, the sum would round the value.
    return value + (soft - lax.stop_gradient(soft))
