"""Makes pixels of relaxed image codes, so that the gradient of an answer flows into its image.

    vectors of the codes  ->  VQ decoder  ->  pixels  ->  vision tower

`policies.soft_choices` makes the vectors.

Source: showlab/UniRL (arXiv 2505.23380) eq. 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models.pillow_resize import make_resize_weights
from corl_jax.policies.image_chunks import choose_chunks
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.network import Janus
from corl_jax.policies.soft_choices import pass_gradient

# The decoder's activations of an image in float32 take 75 MB a layer, and the backward pass has
# all layers of a chunk at once.
DECODED_AT_ONCE = 2
"""Number of images that a device decodes at once with gradient."""


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
