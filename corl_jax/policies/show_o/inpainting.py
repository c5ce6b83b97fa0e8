"""Draws a part of a given image anew: the codes under a mask are unknown, the other ones are kept.

Source: Show-o's `inference_t2i.py`, mode inpainting.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from corl_jax.errors import InputError
from corl_jax.policies.family import Sample, SamplingOptions
from corl_jax.policies.show_o import images, sampling
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.prompts import ImageSettings, cut_square, normalise_pixels
from corl_jax.types import EncodedPrompts, Params, Segment

CUBIC = -0.75
"""The free coefficient of PyTorch's bicubic interpolation."""
THRESHOLD = 0.5


def cut_given_image(
    sizes: ShowOConfig, image: Image.Image, mask: Image.Image
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centre of an image, float32 [S, S, 3], and which codes are drawn, [M] bool.

    White parts of the mask are drawn, black ones kept.

    Raises: InputError for a mask of another size than the image, or without a code to draw.
    """
    if image.size != mask.size:
        raise InputError(
            f"found a mask of {mask.width} x {mask.height} pixels, expected "
            f"{image.width} x {image.height}, as the image"
        )
    side = sizes.image_side
    pixels = cut_square(image.convert("RGB"), side)
    is_drawn = choose_drawn(cut_square(mask.convert("L"), side), sizes.magvit.downsample)
    if not is_drawn.any():
        raise InputError(
            "found a mask without a code to draw; expected white where the image is to change, "
            f"at least {sizes.magvit.downsample} pixels wide in the {side} x {side} pixels of its "
            "centre"
        )
    return normalise_pixels(pixels, ImageSettings(side, sizes.num_image_tokens)), is_drawn


def choose_drawn(levels: np.ndarray, downsample: int) -> np.ndarray:
    """Returns which codes [M] are drawn, by the levels 0..255 of a mask [S, S].

    A code is drawn if the mask is at least half white at its place, by PyTorch's bicubic
    interpolation without antialiasing, which reads 4 x 4 pixels around it.
    """
    table = make_reduction(len(levels), downsample)
    shares = table @ (levels.astype(np.float32) / np.float32(255)) @ table.T
    return (shares >= THRESHOLD).reshape(-1)


def make_reduction(size: int, factor: int) -> np.ndarray:
    """Returns the bicubic weights float32 [size / factor, size] of pixels at every place."""
    count = size // factor
    table = np.zeros((count, size), np.float32)
    for place in range(count):
        # factor 16: place 0 lies at pixel 7.5, between pixels 7 and 8; it reads pixels 6 to 9.
        center = (place + 0.5) * factor - 0.5
        first = int(np.floor(center)) - 1
        for pixel in range(first, first + 4):
            table[place, min(max(pixel, 0), size - 1)] += _weigh(abs(center - pixel))
    return table


def _weigh(distance: float) -> float:
    """Returns the weight of a pixel at a distance below 2."""
    x, a = distance, CUBIC
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a


def bind_given_image(
    sizes: ShowOConfig, params: Params, pixels: np.ndarray, is_drawn: np.ndarray
) -> Sample:
    """Returns a sampler of images that keeps the codes of an image where none is drawn."""
    codes = images.encode_images(sizes, params, jnp.asarray(pixels)[None])
    is_known = jnp.asarray(~is_drawn)[None]

    def sample(
        sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
        options: SamplingOptions,
    ) -> tuple[Segment, ...]:  # fmt: skip
        known = (jnp.repeat(x, len(keys), axis=0) for x in (codes, is_known))
        return sampling.sample_codes(
            sizes, params, prompts, keys, options, (next(known), next(known))
        )

    return sample
