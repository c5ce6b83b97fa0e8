"""Resizing on the device, against Pillow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.models.pillow_resize import resize_levels


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, side", [(16, 24), (24, 16), (64, 20), (20, 61), (8, 8), (1, 5)])
def test_images_are_resized_to_the_bit_as_pillow_does(size, side, name):
    levels = np.random.default_rng(size).integers(0, 256, (2, size, size, 3), np.uint8)
    levels[0, : size // 2] = 255  # edges, beyond which the bicubic filter overshoots
    expected = [
        np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling[name.upper()]))
        for x in levels
    ]
    np.testing.assert_array_equal(resize_levels(jnp.asarray(levels), side, name), expected)


def test_the_published_sizes_too():
    levels = np.random.default_rng(0).integers(0, 256, (1, 384, 384, 3), np.uint8)
    for side, name in ((224, "bilinear"), (224, "bicubic"), (336, "bicubic")):
        resample = Image.Resampling[name.upper()]
        expected = np.asarray(Image.fromarray(levels[0]).resize((side, side), resample))
        np.testing.assert_array_equal(resize_levels(jnp.asarray(levels), side, name)[0], expected)
