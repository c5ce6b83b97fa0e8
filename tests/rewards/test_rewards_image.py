"""Pixel rewards against independent NumPy and SciPy computations, and against fixed numbers."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from corl_jax.errors import InputError
from corl_jax.rewards import image


def pairs(n=2, height=20, width=17, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, height, width, 3)
    return rng.random(shape, np.float32), rng.random(shape, np.float32)


def loop_rmse_sliding_window(a, b, window):
    """Every window by itself; the output position p covers p - window // 2 onwards."""
    border, height, width = round(window / 2), *a.shape[:2]
    values = []
    for channel in range(a.shape[2]):
        for y in range(border, height - border):
            for x in range(border, width - border):
                rows = slice(y - window // 2, y - window // 2 + window)
                columns = slice(x - window // 2, x - window // 2 + window)
                values.append(
                    math.sqrt(((a - b)[rows, columns, channel].astype(float) ** 2).mean())
                )
    return np.mean(values)


def scipy_ssim(a, b):
    """SSIM through SciPy's Gaussian filter, cut to where the 11-pixel window fits."""
    blur = functools.partial(ndimage.gaussian_filter, sigma=1.5, truncate=5 / 1.5)
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        mx, my = blur(x), blur(y)
        vx, vy, c = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        top = (2 * mx * my + 1e-4) * (2 * c + 9e-4)
        bottom = (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
        values.append((top / bottom)[5:-5, 5:-5].mean())
    return np.mean(values)


def test_mse_rmse_psnr_by_hand():
    a, b = np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.float32)
    b[0] = 0.1
    b[1, :2] = 1.0
    np.testing.assert_allclose(image.mse(a, b), [0.01, 0.5], rtol=1e-5)
    np.testing.assert_allclose(image.rmse(a, b), [0.1, math.sqrt(0.5)], rtol=1e-5)
    np.testing.assert_allclose(image.psnr(a, b), [20.0, 10 * math.log10(2)], rtol=1e-5)


def test_psnr_of_equal_images_is_finite():
    a, _ = pairs()
    np.testing.assert_allclose(image.psnr(a, a), 100.0, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 8])
def test_rmse_sliding_window_equals_the_loop(window):
    a, b = pairs()
    expected = [loop_rmse_sliding_window(x, y, window) for x, y in zip(a, b, strict=True)]
    found = jax.jit(image.rmse_sliding_window, static_argnums=2)(a, b, window)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def ramp_pair():
    """Two smooth images that any library can rebuild: [1, 24, 20, 3] in [0, 1]."""
    y, x, c = np.meshgrid(np.arange(24), np.arange(20), np.arange(3), indexing="ij")
    a = (np.sin(0.3 * y + 0.5 * x + c) + 1) / 2
    b = (np.cos(0.2 * y - 0.4 * x + 2 * c) + 1) / 2
    return a[None].astype(np.float32), b[None].astype(np.float32)


def test_fixed_numbers_of_torchmetrics():
    """Values that torchmetrics 1.9.0 gives for these images; its SSIM map without the border."""
    a, b = ramp_pair()
    np.testing.assert_allclose(image.rmse_sliding_window(a, b), 0.490698278, rtol=1e-5)
    np.testing.assert_allclose(image.ssim(a, b), 0.0362979509, rtol=1e-4)


def test_ssim_equals_scipy():
    a, b = pairs(n=2, height=24, width=19)
    b = 0.7 * a + 0.3 * b
    expected = [scipy_ssim(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(image.ssim)(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(image.ssim(a, a), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", list(image.IMAGE_TERMS))
def test_image_terms_are_similarities(name):
    a, b = pairs(n=3, height=24, width=24)
    a[2], b[2] = 0.0, 1.0  # as far apart as images can be
    term = jax.jit(functools.partial(image.image_term, name))
    np.testing.assert_allclose(term(a, a), 1.0, atol=1e-5)
    scores = np.asarray(term(a, b))
    assert scores.shape == (3,) and (scores >= 0).all() and (scores < 0.9).all()
    assert scores[2] == pytest.approx(0.0, abs=1e-3)
    closer = np.asarray(term(a, 0.5 * a + 0.5 * b))
    assert (closer > scores).all()


def test_rows_do_not_see_each_other():
    a, b = pairs(n=3, height=16, width=16)
    for name in image.IMAGE_TERMS:
        together = image.image_term(name, a, b)
        alone = [image.image_term(name, a[i : i + 1], b[i : i + 1])[0] for i in range(3)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_ssim_term_clips_inverted_images():
    a, _ = pairs(height=16, width=16)
    assert (np.asarray(image.ssim(a, 1 - a)) < 0).all()
    np.testing.assert_array_equal(image.image_term("ssim", a, 1 - a), 0.0)


def test_unusable_images_are_refused():
    a, b = pairs(height=8, width=40)
    with pytest.raises(InputError, match="rmse window 8: images of 8x40"):
        image.rmse_sliding_window(a, b)
    with pytest.raises(InputError, match="ssim: images of 8x40"):
        image.ssim(a, b)
    with pytest.raises(InputError, match="'lpips': expected one of rmse, mse, ssim, psnr"):
        image.image_term("lpips", a, b)
    with pytest.raises(InputError, match="bring the real ones to size"):
        image.image_term("mse", a, b[:, :4])


def test_cycle_reward():
    text, pixels = jnp.array([0.5, 1.0, math.nan]), jnp.array([0.25, 1.0, 1.0])
    np.testing.assert_allclose(image.cycle_reward(text, pixels, False), [0.75, 2.0, math.nan])
    np.testing.assert_allclose(image.cycle_reward(text, pixels, True), [0.375, 1.0, math.nan])


def test_pixel_mse_reward_works_on_normalised_images():
    a, b = np.full((1, 16, 16, 3), 0.5, np.float32), np.full((1, 16, 16, 3), 0.75, np.float32)
    np.testing.assert_allclose(image.pixel_mse_reward(a, b), [1 - 0.5], rtol=1e-5)
    np.testing.assert_allclose(image.pixel_mse_reward(0 * a, 0 * a + 1), [-1.0], rtol=1e-5)


def stripes(width=80, height=40):
    """Left quarter red, right quarter blue, the middle half green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 4, 0] = 255
    pixels[:, width // 4 : 3 * width // 4, 1] = 255
    pixels[:, 3 * width // 4 :, 2] = 255
    return Image.fromarray(pixels)


def test_squash_keeps_all_content():
    squashed = image.fit_image(stripes(), 16)
    assert squashed.shape == (16, 16, 3) and squashed.dtype == np.uint8
    np.testing.assert_array_equal(squashed[:, 1], np.tile([255, 0, 0], (16, 1)))
    np.testing.assert_array_equal(squashed[:, 14], np.tile([0, 0, 255], (16, 1)))


def test_centre_crop_keeps_the_aspect():
    cropped = image.fit_image(stripes(), 16, "centre_crop")
    # The outermost columns are blurred with what lies just outside, as after resize and crop.
    np.testing.assert_array_equal(cropped[:, 1:-1], np.tile([0, 255, 0], (16, 14, 1)))
    assert (cropped[:, [0, -1], 1] > 216).all()
    upright = image.fit_image(stripes().rotate(-90, expand=True), 16, "centre_crop")
    np.testing.assert_array_equal(upright, cropped.swapaxes(0, 1))


def test_pad_keeps_everything_between_grey_bars():
    padded = image.fit_image(stripes(), 48, "pad")  # twice as wide as high: bars of a quarter
    np.testing.assert_array_equal(padded[14:34], image.fit_image(stripes(), 48)[14:34])
    for row in (0, 10, 37, 47):
        np.testing.assert_array_equal(padded[row], np.full((48, 3), 127))
    upright = image.fit_image(stripes().rotate(-90, expand=True), 48, "pad")
    np.testing.assert_array_equal(upright, padded.swapaxes(0, 1))


def test_fit_antialiases_and_takes_any_mode():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    grey = image.fit_image(Image.fromarray(checkers.astype(np.uint8), "L"), 8)
    assert grey.shape == (8, 8, 3) and np.abs(grey / 255 - 0.5).max() < 0.02
    with pytest.raises(InputError, match="expected one of squash, centre_crop"):
        image.fit_image(stripes(), 8, "stretch")


def test_levels_are_scaled_to_the_bit_as_the_host_does():
    levels = np.arange(256, dtype=np.uint8)
    for scale in (image.scale_levels, jax.jit(image.scale_levels)):
        expected = levels.astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(np.asarray(scale(levels)), expected)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_squares_are_left_to_the_device_and_others_are_resized_by_pillow(name):
    levels = np.random.default_rng(3).integers(0, 256, (2, 9, 31, 3), dtype=np.uint8)
    squares = levels[:, :, :9]
    assert image.resize_on_host(squares, 8, name) is squares
    for found, before in zip(image.resize_on_host(levels, 8, name), levels, strict=True):
        expected = Image.fromarray(before).resize((8, 8), Image.Resampling[name.upper()])
        np.testing.assert_array_equal(found, np.asarray(expected))
