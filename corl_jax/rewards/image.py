"""Compares generated images with real ones: arrays -> one float per image.

Images are [N, H, W, 3] float32 in [0, 1]; results are [N] float32. jit can trace these functions,
except three: `fit_image` and `resize_on_host` resize images on the host, and `lpips_distance` runs
a network on all rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from corl_jax.devices.batches import (
    PendingRows,
    find_mesh,
    num_batch_shards,
    process_shard,
    run_in_pieces,
)
from corl_jax.devices.compiling import ExactProgram
from corl_jax.devices.processes import all_gather
from corl_jax.errors import InputError
from corl_jax.models import modules, pillow_resize
from corl_jax.models.vgg import Lpips, VggConfig
from corl_jax.types import Params

RMSE_WINDOW = 8
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# A smaller difference of two 8-bit images is rounding. It gives 100 dB.
MIN_MSE = 1e-10
# People see no difference from 40 dB on; the PSNR term is 1 from there on.
PSNR_CEILING_DB = 40.0
FITS = ("squash", "centre_crop", "pad")
PAD_COLOR = (127, 127, 127)  # as the policy's image processor pads
LPIPS_SIZE = 224  # pixels a side, as the released code compares
LPIPS_IMAGES_AT_ONCE = 32  # 25 MB of float32 features each


def mse(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Computes the mean squared difference over pixels and channels, in [0, 1]."""
    return jnp.square(generated - real).mean(axis=(1, 2, 3))


def rmse(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Computes the root of the mean squared difference of the whole image, in [0, 1]."""
    return jnp.sqrt(mse(generated, real))


def psnr(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Computes the peak signal-to-noise ratio in dB for a peak of 1; 100 dB for equal images."""
    # The smallest error bounds the logarithm, which is infinite for equal images.
    return -10.0 * jnp.log10(jnp.maximum(mse(generated, real), MIN_MSE))


def rmse_sliding_window(
    generated: jax.Array, real: jax.Array, window: int = RMSE_WINDOW
) -> jax.Array:
    """Computes the RMSE inside a sliding square window, averaged over positions and channels.

    The root comes before the mean, so flat regions with a large error weigh less than in `rmse`.
    Equal to torchmetrics' `root_mean_squared_error_using_sliding_window`.
    Raises: InputError if the image is too small for the window.
    """
    # torchmetrics pads, filters, and then cuts round(window / 2) from each border. The rest never
    # saw the padding, so none is needed here. For even windows the last position is left out:
    # H = 24, window 8: 17 positions fit, border 4 leaves 24 - 2 * 4 = 16 of them, from offset 0.
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
    """Computes the structural similarity in [-1, 1]: 11x11 Gaussian, sigma 1.5, data range 1.

    The average is over channels and over the positions where the window fits into the image.
    Raises: InputError if the images are smaller than the window.
    Source: Wang et al. 2004, section III-B.
    """
    height, width = generated.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"ssim: images of {height}x{width} are smaller than its window of {SSIM_WINDOW}; use "
            "another image term"
        )
    kernel = jnp.asarray(_make_gaussian(SSIM_WINDOW, SSIM_SIGMA))
    blur = functools.partial(_filter_valid, kernel=kernel)
    # Without padding. torchmetrics also averages over a border that it pads by reflection.
    mean_x, mean_y = blur(generated), blur(real)
    # E[x^2] - E[x]^2: the weights of the window sum to 1.
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
"""The image terms of the cycle reward without a network; `image_term` clips them to [0, 1]."""


def image_term(name: str, generated: jax.Array, real: jax.Array) -> jax.Array:
    """Computes the similarity `name`, a key of IMAGE_TERMS: [N] in [0, 1], 1 for equal images.

    `rmse` and `mse`: 1 - the error, `rmse` with a sliding window. `psnr`: the fraction of 40 dB.
    Raises: InputError if the name is unknown or the shapes differ.
    """
    if name not in IMAGE_TERMS:
        raise InputError(f"image term {name!r}: expected one of {', '.join(IMAGE_TERMS)}")
    if generated.shape != real.shape:
        raise InputError(
            f"image term {name}: generated images are {generated.shape}, real images "
            f"{real.shape}; bring the real ones to size with `fit`"
        )
    # SSIM is negative for anti-correlated images: they get 0, as unrelated images do.
    return jnp.clip(IMAGE_TERMS[name](generated, real), 0.0, 1.0)


def cycle_reward(text_term: jax.Array, image_term: jax.Array, normalise: bool) -> jax.Array:
    """Computes R_cycle [N], the text term plus the image term; `normalise` halves the sum.

    NaN in either term gives NaN.
    Source: arXiv 2505.17534 eq. 3.
    """
    # The paper's v3 says "normalised to [0, 1]" without a formula. Both terms are in [0, 1], so we
    # read it as half of their sum.
    total = jnp.asarray(text_term, jnp.float32) + jnp.asarray(image_term, jnp.float32)
    return total / 2.0 if normalise else total


def pixel_mse_reward(generated: jax.Array, real: jax.Array) -> jax.Array:
    """Computes 1 - sliding-window RMSE of the images normalised to [-1, 1]; in [-1, 1].

    Source: the released code, t2i_pixel_mse.
    """
    # The released code compares the output of the image processor (mean 0.5, std 0.5). An error
    # therefore counts twice as much as in the `rmse` image term.
    return 1.0 - rmse_sliding_window(2.0 * generated - 1.0, 2.0 * real - 1.0)


def scale_levels(levels: jax.Array) -> jax.Array:
    """Returns uint8 levels as float32 in [0, 1], to the bit as the host divides them by 255."""
    # A table made on the host: XLA may replace the division by a product, which rounds differently.
    return jnp.take(jnp.asarray(np.arange(256, dtype=np.float32) / 255), levels, axis=0)


def resize_on_host(images: np.ndarray, size: int, name: pillow_resize.Filter) -> np.ndarray:
    """Returns images uint8 [N, H, W, 3] as [N, size, size, 3], but squares as they are.

    A program resizes squares itself, by `pillow_resize.resize_levels`.
    """
    if images.shape[1] == images.shape[2]:
        return images
    resample = Image.Resampling[name.upper()]
    resized = (Image.fromarray(x).resize((size, size), resample) for x in images)
    return np.stack([np.asarray(x) for x in resized])


def fit_image(image: Image.Image, size: int, how: str = "squash") -> np.ndarray:
    """Resizes a PIL image to uint8 [size, size, 3], like a generated image.

    The filter is bilinear with antialiasing, as in the released code. `squash` keeps all content
    and changes the aspect ratio. `centre_crop` keeps the aspect ratio and cuts what is outside the
    largest centred square. `pad` keeps both and adds grey bars (Q25).
    Raises: InputError if `how` is unknown.
    """
    if how not in FITS:
        raise InputError(f"image fit {how!r}: expected one of {', '.join(FITS)}")
    # COCO has grey images, which the released code cannot read (Q12).
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
    # PIL widens its bilinear kernel with the scale. This is the antialiasing.
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def fit_images(
    images: Sequence[Image.Image | None], size: int, how: str = "squash"
) -> list[np.ndarray | None]:
    """Resizes images as `fit_image` does; None stays None."""
    # The completions of a prompt share one image object, so it is resized once.
    distinct = {id(x): x for x in images if x is not None}
    with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter while it resizes
        resized = threads.map(lambda x: fit_image(x, size, how), distinct.values())
        by_object = dict(zip(distinct, resized, strict=True))
    return [by_object.get(id(x)) for x in images]


def _filter_valid(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Filters each channel by kernel x kernel [K, K], without padding: [N, H-K+1, W-K+1, C]."""
    # Sums of shifted images, along one axis and then the other. They are float32 on every backend.
    # A convolution would use TF32 or bfloat16 on an accelerator.
    # K = 3, rows: k0 * x[0:H-2] + k1 * x[1:H-1] + k2 * x[2:H]; then the same over columns.
    size = kernel.shape[0]
    height, width = images.shape[1] - size + 1, images.shape[2] - size + 1
    rows = kernel[0] * images[:, :height]
    for k in range(1, size):
        rows += kernel[k] * images[:, k : k + height]
    filtered = kernel[0] * rows[:, :, :width]
    for k in range(1, size):
        filtered += kernel[k] * rows[:, :, k : k + width]
    return filtered


def _make_gaussian(window: int, sigma: float) -> np.ndarray:
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return (weights / weights.sum()).astype(np.float32)


# ---- LPIPS


def lpips_distance(
    network: Any,
    generated: np.ndarray,
    real: Sequence[Image.Image | None],
    *,
    size: int = LPIPS_SIZE,
    fit: str = "squash",
) -> PendingRows:
    """Computes LPIPS of generated images [N, S, S, 3] uint8 to real ones: [N], NaN without one.

    Both are resized to `size` pixels a side, bilinear with antialiasing. `fit` says how the real
    images are resized (see `fit_image`). `network` is a Network of a Lpips.
    Source: the released code (torchmetrics' LPIPS, net_type vgg, normalize).
    """
    fitted = fit_images(real, size, fit)
    # For rows without a real image, so that the program keeps one shape. NaN replaces the distance
    # below.
    blank = np.zeros((size, size, 3), np.uint8)
    generated = resize_on_host(generated, size, "bilinear")
    count = _choose_shared_rows(real, network.params)
    # Pieces are of whole groups of `count` rows: a group and its real image are on one device.
    groups = generated.reshape(-1, count, *generated.shape[1:])

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first_rows = index * count
        return groups[index], np.stack(
            [blank if fitted[i] is None else fitted[i] for i in first_rows]
        )

    program = functools.partial(_compute_lpips, network.config, network.params)
    max_groups = LPIPS_IMAGES_AT_ONCE // count
    (distances,) = run_in_pieces(program, take, len(groups), max_groups, network.params)
    is_missing = [x is None for x in fitted]
    return distances.then(lambda x: np.where(is_missing, np.float32(np.nan), x.reshape(-1)))


def _choose_shared_rows(real: Sequence[Image.Image | None], params: Params) -> int:
    """Returns how many rows that follow each other are compared with one computed real image.

    The completions of a prompt share one image object. The number divides every run of rows with
    one object, in all processes alike, because they run one program.
    """
    runs = [len(list(rows)) for _, rows in itertools.groupby(real, key=id)]
    shared = math.gcd(*all_gather(np.array(math.gcd(*runs), np.int32)).ravel().tolist())
    mesh = find_mesh(params)
    parts = 1 if mesh is None else num_batch_shards(mesh) // process_shard(mesh)[1]

    def count_images(count: int) -> int:
        # Of one device. 8 rows of one real image on 8 devices: 8 groups of 1 are 2 images a device,
        # 1 group of 8 is padded to 8 groups, 9 images a device.
        return -(-len(real) // (count * parts)) * (count + 1)

    divisors = (n for n in range(1, LPIPS_IMAGES_AT_ONCE + 1) if shared % n == 0)
    return min(divisors, key=count_images)


@functools.partial(ExactProgram, static_argnames=("config",))
def _compute_lpips(
    config: VggConfig, params: Params, generated: jax.Array, real: jax.Array
) -> jax.Array:
    """Computes distances [M, C] of images [M, C, H, W, 3] to the real ones [M, S, S, 3]."""
    groups = generated.shape[:2]
    generated = generated.reshape(-1, *generated.shape[2:])
    generated = pillow_resize.resize_levels(generated, real.shape[1], "bilinear")
    # Rounded products of an accelerator change the distance by as much as small edits do.
    with jax.default_matmul_precision("highest"):
        pixels = scale_levels(generated), scale_levels(real)
        return modules.bind(Lpips, config, params)(*pixels).reshape(groups)
