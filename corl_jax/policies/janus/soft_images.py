"""Lets the gradient of an answer flow into the image that it is about (straight-through Gumbel).

The image was sampled. One pass over its codes gives the logits z of every place. Their relaxed
choice y = softmax(s / tau) has the gradient, and the sampled codes give the value:

    h + y - stop_gradient(y)  ->  code vectors  ->  VQ decoder  ->  pixels  ->  vision tower

The scores s are Gumbel noise of which the sampled code is the winner, so that y belongs to the
image that was really drawn. With `redraw` the noise is fresh, and another image is drawn.

Source: showlab/UniRL (arXiv 2505.23380) eq. 3; posterior noise: Maddison et al. 2014
(arXiv 1411.0030), truncated Gumbels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.policies.chunked_logprobs import map_chunks
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.image_chunks import choose_chunks
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.network import Janus
from corl_jax.policies.janus.pillow_resize import make_resize_weights

# The decoder's activations of an image in float32 take 75 MB a layer, and the backward pass has
# all layers of a chunk at once.
DECODED_AT_ONCE = 2
"""Number of images that a device decodes at once with gradient."""

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
    model: Janus, states: jax.Array, codes: jax.Array, keys: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """Returns code vectors [N, T, E] with the relaxed gradient, and the chosen codes [N, T].

    `states` [N, T, D] score the codes. `options.chunk` tokens have logits at once.
    """
    through, book = options.straight_through, model.vqmodel.codebook().astype(jnp.float32)
    assert through is not None  # the stage is one with gradients through images

    def choose(piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, chosen, places = piece
        logits = model.image_logits(hidden).astype(jnp.float32)
        noise = draw_noise(keys, places[0], logits.shape[-1])
        scores, chosen = score_codes(logits, chosen, noise, through.redraw)
        relaxed = jax.nn.softmax(scores / through.temperature, axis=-1)
        # Equal to (h + y - stop_gradient(y)) @ book, without the one-hots h.
        return pass_gradient(book[chosen], relaxed @ lax.stop_gradient(book)), chosen

    places = jnp.broadcast_to(jnp.arange(codes.shape[1]), codes.shape)
    return map_chunks(choose, (states, codes, places), options.chunk)


def make_soft_pixels(
    model: Janus, vectors: jax.Array, hard: jax.Array, settings: ImageSettings
) -> jax.Array:
    """Returns pixel values [N, S, S, 3] with the value `hard` and the gradient of `vectors`.

    `hard` are the pixel values of the same codes as the processor makes them. Rounding to 8 bits
    and the clamp to [0, 1] let the gradient through unchanged.
    """
    rows, length, _ = vectors.shape
    chunks, size = choose_chunks(rows, DECODED_AT_ONCE)
    padded = jnp.pad(vectors, ((0, chunks * size - rows), (0, 0), (0, 0)))
    side = round(length**0.5)

    @jax.checkpoint
    def decode(latents: jax.Array) -> jax.Array:
        grid = constrain(latents, "batch", "length", None).reshape(size, side, side, -1)
        return model.vqmodel.decode_latents(grid).astype(jnp.float32)

    decoded = lax.map(decode, padded.reshape(chunks, size, length, -1))
    pixels = (decoded.reshape(-1, *decoded.shape[2:])[:rows] + 1) / 2
    if pixels.shape[1] != settings.size:
        table = jnp.asarray(make_resize_weights(pixels.shape[1], settings.size), jnp.float32)
        pixels = jnp.einsum("oy,nyxc->noxc", table, jnp.einsum("ox,nyxc->nyoc", table, pixels))
    pixels = pixels / np.asarray(settings.std, np.float32)
    return constrain(pass_gradient(hard, pixels), "batch", None, None, None)


def pass_gradient(value: jax.Array, soft: jax.Array) -> jax.Array:
    """Returns `value` to the bit, with the gradient of `soft` beside its own."""
    # In another order, value + soft - soft, the sum would round the value.
    return value + (soft - lax.stop_gradient(soft))
