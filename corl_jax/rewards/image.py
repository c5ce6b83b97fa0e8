"""Pixel rewards: arrays -> one float per image.

Images are [N, H, W, 3] float32 in [0, 1]; results are [N] float32. All but `fit` are jax and can
be called inside jit. `fit` brings a real photo to the size of the generated images on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from corl_jax.errors import InputError

RMSE_WINDOW = 8
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# Below this the difference of two 8-bit images is rounding: 100 dB.
MIN_MSE = 1e-10
# 40 dB is where people stop seeing a difference; the PSNR term is 1 from there on.
PSNR_CEILING_DB = 40.0
FITS = ("squash", "centre_crop", "pad")
PAD_COLOR = (127, 127, 127)  # that of the image processor


def mse(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Mean squared difference over pixels and channels, in [0, 1]."""
    return jnp.square(generated - real).mean(axis=(1, 2, 3))


def rmse(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Root of the mean squared difference of the whole image, in [0, 1]."""
    return jnp.sqrt(mse(generated, real))


def psnr(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB for a peak of 1; 100 dB for equal images."""
    return -10.0 * jnp.log10(jnp.maximum(mse(generated, real), MIN_MSE))


def rmse_sliding_window(
    generated: jax.Array, real: jax.Array, window: int = RMSE_WINDOW
) -> jax.Array:
    """Mean over positions and channels of the RMSE inside a sliding square window.

    Flat regions with a large error weigh less than in `rmse`, because the root is taken before
    the mean. Equal to torchmetrics' `root_mean_squared_error_using_sliding_window`, which pads,
    filters, and then cuts round(window / 2) from each border: what is left never saw the
    padding, so no padding is needed here, but for even windows the last position is left out.
    Raises: InputError if the image has no room for such a window.
    """
    border = round(window / 2)
    height, width = generated.shape[1:3]
    if window < 1 or min(height, width) <= 2 * border:
        raise InputError(
            f"rmse window {window}: images of {height}x{width} need more than {2 * border} pixels "
            "a side; use a smaller window or larger images"
        )
    offset = border - window // 2
    squared = jnp.square(generated - real)
    filtered = _filter_valid(squared, jnp.full((window,), 1.0 / window, jnp.float32))
    rows = slice(offset, offset + height - 2 * border)
    columns = slice(offset, offset + width - 2 * border)
    # Positive sums of squares: the filter cannot make them negative, so no clamp.
    return jnp.sqrt(filtered[:, rows, columns]).mean(axis=(1, 2, 3))


def ssim(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Structural similarity in [-1, 1]: 11x11 Gaussian window, sigma 1.5, data range 1.

    Averaged over channels and over the positions where the window fits into the image;
    torchmetrics pads by reflection and averages over the padded border as well.
    Raises: InputError if the images are smaller than the window.
    Source: Wang et al. 2004, section III-B.
    """
    height, width = generated.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"ssim: images of {height}x{width} are smaller than its window of {SSIM_WINDOW}; use "
            "another image term"
        )
    kernel = jnp.asarray(_gaussian(SSIM_WINDOW, SSIM_SIGMA))
    blur = functools.partial(_filter_valid, kernel=kernel)
    mean_x, mean_y = blur(generated), blur(real)
    var_x = blur(generated * generated) - mean_x**2
    var_y = blur(real * real) - mean_y**2
    covariance = blur(generated * real) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


IMAGE_TERMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "rmse": lambda generated, real: 1.0 - rmse_sliding_window(generated, real),
    "mse": lambda generated, real: 1.0 - mse(generated, real),
    "ssim": ssim,
    "psnr": lambda generated, real: psnr(generated, real) / PSNR_CEILING_DB,
}
"""The image terms of the cycle reward that need no network; `image_term` bounds them."""


def image_term(name: str, generated: jax.Array, real: jax.Array) -> jax.Array:
    """The similarity called `name` (a key of IMAGE_TERMS), [N] in [0, 1], 1 for equal images.

    `rmse` and `mse`: 1 - the (sliding-window) error. `ssim`: 0 for anti-correlated images too,
    which are no better than unrelated ones. `psnr`: the share of 40 dB.
    Raises: InputError if the name is unknown or the shapes differ.
    """
    if name not in IMAGE_TERMS:
        raise InputError(f"image term {name!r}: expected one of {', '.join(IMAGE_TERMS)}")
    if generated.shape != real.shape:
        raise InputError(
            f"image term {name}: generated images are {generated.shape}, real images "
            f"{real.shape}; bring the real ones to size with `fit`"
        )
    return jnp.clip(IMAGE_TERMS[name](generated, real), 0.0, 1.0)


def cycle_reward(text_term: jax.Array, image_term: jax.Array, normalise: bool) -> jax.Array:
    """R_cycle: the text term plus the image term [N]; halved to [0, 1] when `normalise`.

    Source: arXiv 2505.17534 eq. 3; the halving is our reading of v3's "normalised to
    [0, 1]", both terms lying there. NaN in either term stays NaN.
    """
    total = jnp.asarray(text_term, jnp.float32) + jnp.asarray(image_term, jnp.float32)
    return total / 2.0 if normalise else total


def pixel_mse_reward(generated: jax.Array, real: jax.Array) -> jax.Array:
    """t2i_pixel_mse: 1 - sliding-window RMSE of the images normalised to [-1, 1].

    The normalisation (mean 0.5, std 0.5) is the image processor's, so an error counts twice
    what it does in the `rmse` image term: range [-1, 1].
    Source: the released code.
    """
    return 1.0 - rmse_sliding_window(2.0 * generated - 1.0, 2.0 * real - 1.0)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """The whole image as [size, size, 3] float32 in [0, 1], its aspect given up.

    Bilinear with antialiasing, as the released reward resizes (Q25).
    """
    return fit(image, size, "squash")


def fit(image: Image.Image, size: int, how: str = "squash") -> np.ndarray:
    """A PIL image as [size, size, 3] float32 in [0, 1], comparable to a generated one.

    `squash` keeps all content and gives up the aspect; `centre_crop` keeps the aspect and gives
    up what lies outside the largest centred square; `pad` keeps both and adds grey bars (Q25).
    Raises: InputError if `how` is unknown.
    """
    if how not in FITS:
        raise InputError(f"image fit {how!r}: expected one of {', '.join(FITS)}")
    image = image.convert("RGB")
    if how == "pad":
        side = max(image.size)
        image = ImageOps.pad(image, (side, side), color=PAD_COLOR)
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if how == "centre_crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    # PIL widens its bilinear kernel with the scale, which is the antialiasing.
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized, np.float32) / 255.0


def _filter_valid(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel filtered by kernel x kernel [K, K], where it fits: [N, H-K+1, W-K+1, C].

    Sums of shifted images, along one axis and then the other: 2K reads of the image in float32
    on every backend, where a convolution would fall to TF32 or bfloat16 on an accelerator.
    """
    size = kernel.shape[0]
    height, width = images.shape[1] - size + 1, images.shape[2] - size + 1
    rows = kernel[0] * images[:, :height]
    for k in range(1, size):
        rows += kernel[k] * images[:, k : k + height]
    filtered = kernel[0] * rows[:, :, :width]
    for k in range(1, size):
        filtered += kernel[k] * rows[:, :, k : k + width]
    return filtered


def _gaussian(window: int, sigma: float) -> np.ndarray:
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return (weights / weights.sum()).astype(np.float32)
