"""Finds the objects of images with Mask2Former, as mmdetection 2.x tests its model for COCO.

An image is resized so that it just fits into 1333 x 800 (OpenCV's bilinear resizing of bytes),
normalised and padded with zeros to multiples of 32. The instances are the 100 pairs of a query
and a class with the largest probabilities. A pair's score is its probability times the mean of the
mask's sigmoids within the mask; the mask is where the sigmoid is above one half at the size of the
image, and the box is the smallest around it.

transformers' `post_process_instance_segmentation` differs: it takes as many pairs as there are
queries, computes masks and their scores at 384 x 384 whatever the image, resizes the finished mask
to the image by the nearest pixel, drops scores below its threshold, and lets later masks cover
earlier ones unless it is asked for binary maps. It gives no boxes.

Sources: mmdetection 2.25 `configs/mask2former/mask2former_r50_lsj_8x2_50e_coco.py` (test pipeline),
`models/dense_heads/maskformer_head.py` (simple_test), `maskformer_fusion_head.py`
(instance_postprocess), `core/mask/utils.py` (mask2bbox); mmcv 1.7 `image/geometric.py` (imrescale);
OpenCV 4 `imgproc/src/resize.cpp`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from corl_jax.models import modules
from corl_jax.models.mask2former import Mask2Former, Mask2FormerConfig
from corl_jax.types import Array, Params

PAD_MULTIPLE = 32
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of bytes, red first
MAX_INSTANCES = 100
QUERIES_AT_ONCE = 20
COEFFICIENT_BITS = 11  # of OpenCV's weights of pixels

Sides = tuple[int, int]
"""Height and width."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Instances:
    """The instances of B images, without order."""

    scores: Array  # [B, K] float32
    labels: Array  # [B, K] int32
    queries: Array  # [B, K] int32, the query whose mask it is
    boxes: Array  # [B, Q, 4] float32: left, top, right, bottom; 0 for an empty mask
    masks: Array  # [B, Q, H, ceil(W / 8)] uint8, eight pixels a byte, the leftmost one highest


@functools.partial(jax.jit, static_argnames=("config",))
def find_instances(config: Mask2FormerConfig, params: Params, images: jax.Array) -> Instances:
    """Finds the instances in images [B, H, W, 3] uint8; computes in the dtype of the parameters."""
    _, height, width, _ = images.shape
    resized = fit_sides((height, width), config.shorter_side, config.longer_side)
    pixels = prepare_pixels(images, resized)
    classes, masks = modules.bind(Mask2Former, config, params)(pixels)
    padded = (pixels.shape[1], pixels.shape[2])
    return select_instances(classes, masks, padded, resized, (height, width))


# ---- before the network


def fit_sides(sides: Sides, shorter: int, longer: int) -> Sides:
    """Returns the largest sides of the same ratio with at most these lengths."""
    # Into 800 and 1333: 384 x 384 -> 800 x 800; 200 x 600 -> 444 x 1333
    scale = min(longer / max(sides), shorter / min(sides))
    return int(sides[0] * scale + 0.5), int(sides[1] * scale + 0.5)


def prepare_pixels(images: jax.Array, resized: Sides) -> jax.Array:
    """Returns normalised, padded pixels [B, H', W', 3] float32 of bytes [B, H, W, 3]."""
    pixels = resize_bytes(images, resized).astype(jnp.float32)
    pixels = (pixels - jnp.array(MEAN)) / jnp.array(DEVIATION)
    below, right = (-side % PAD_MULTIPLE for side in resized)
    return jnp.pad(pixels, ((0, 0), (0, below), (0, right), (0, 0)))


def resize_bytes(images: jax.Array, sides: Sides) -> jax.Array:
    """Resizes uint8 [B, H, W, C] bilinearly, not antialiased, to the bit as OpenCV.

    OpenCV computes with whole numbers. It rounds the weights to 11 bits, drops 4 bits after the
    horizontal sums and 16 after the vertical products.
    """
    if images.shape[1:3] == sides:
        return images
    # A row above the first one is the first one, with its own weight; a column is left out.
    top, bottom, upper, lower = weigh_neighbours(images.shape[1], sides[0], keep_outside=True)
    left, right, before, after = weigh_neighbours(images.shape[2], sides[1], keep_outside=False)
    values = images.astype(jnp.int32)
    columns = values[:, :, left] * before[:, None] + values[:, :, right] * after[:, None]
    columns >>= 4
    rows = (columns[:, top] * upper[:, None, None] >> 16) + (
        columns[:, bottom] * lower[:, None, None] >> 16
    )
    return (rows + 2 >> 2).astype(jnp.uint8)


def weigh_neighbours(length: int, new: int, *, keep_outside: bool) -> tuple[np.ndarray, ...]:
    """Returns the two neighbours of each new position, and their weights times 2^11, all [new].

    `keep_outside`: a neighbour beyond the border keeps its weight, for the pixel at the border.
    """
    places = ((np.arange(new) + 0.5) * (length / new) - 0.5).astype(np.float32)
    first = np.floor(places).astype(np.int32)
    share = places - first.astype(np.float32)
    if not keep_outside:
        share[(first < 0) | (first >= length - 1)] = 0
    scale = np.float32(2**COEFFICIENT_BITS)
    weights = (np.rint(part * scale).astype(np.int32) for part in (np.float32(1) - share, share))
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1), *weights


# ---- after the network


def select_instances(
    classes: jax.Array, masks: jax.Array, padded: Sides, resized: Sides, sides: Sides
) -> Instances:
    """Selects instances from class logits [B, Q, C + 1] and mask logits [B, Q, h, w].

    `padded` are the sides of the network's input, of which `resized` is the image, and `sides`
    those of the image itself.
    """
    probabilities = jax.nn.softmax(classes.astype(jnp.float32), axis=-1)[..., :-1]
    batch, num_queries, num_classes = probabilities.shape
    flat = probabilities.reshape(batch, -1)
    scores, index = lax.top_k(flat, min(MAX_INSTANCES, num_queries * num_classes))
    queries, labels = index // num_classes, index % num_classes
    # Two resizings and the cut between them are linear, so one matrix a side does them all.
    down, across = (
        jnp.asarray(
            make_resize_matrix(resized[axis], sides[axis])
            @ make_resize_matrix(masks.shape[2 + axis], padded[axis])[: resized[axis]],
            jnp.float32,
        )
        for axis in (0, 1)
    )
    # A few queries at a time: all masks of 16 images of 1024 x 1024 are 7 GB. The images stay
    # together, because a mesh splits them over its devices.
    by_query = lax.map(
        lambda logits: _measure_masks(logits, down, across),
        masks.swapaxes(0, 1),
        batch_size=QUERIES_AT_ONCE,
    )
    mask_scores, boxes, packed = (x.swapaxes(0, 1) for x in by_query)
    scores *= jnp.take_along_axis(mask_scores, queries, axis=1)
    return Instances(scores, labels, queries, boxes, packed)


def _measure_masks(
    logits: jax.Array, down: jax.Array, across: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns scores [B], boxes [B, 4] and packed masks of logits [B, h, w]."""
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("yh,bhw,xw->byx", down, logits, across)
    inside = logits > 0
    area = inside.sum(axis=(1, 2), dtype=jnp.float32)
    total = jnp.where(inside, jax.nn.sigmoid(logits), 0.0).sum(axis=(1, 2))
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    height, width = rows.shape[1], columns.shape[1]
    edges = [
        columns.argmax(axis=1),
        rows.argmax(axis=1),
        # The end is behind the last pixel: [0, 1, 1, 0] -> 1 to 3.
        width - columns[:, ::-1].argmax(axis=1),
        height - rows[:, ::-1].argmax(axis=1),
    ]
    boxes = jnp.where(area[:, None] > 0, jnp.stack(edges, axis=1), 0).astype(jnp.float32)
    return total / (area + 1e-6), boxes, jnp.packbits(inside, axis=-1)


def make_resize_matrix(length: int, new: int) -> np.ndarray:
    """Returns [new, length]: bilinear resizing as PyTorch's with `align_corners=False`."""
    places = np.clip((np.arange(new) + 0.5) * (length / new) - 0.5, 0, length - 1)
    first = np.floor(places).astype(int)
    matrix = np.zeros((new, length))
    matrix[np.arange(new), first] = 1 - (places - first)
    # The last position has no next one; its share is 0 then.
    matrix[np.arange(new), np.minimum(first + 1, length - 1)] += places - first
    return matrix


def unpack_mask(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns a mask of `Instances` as bool [H, W]."""
    return np.unpackbits(packed, axis=-1, count=width).astype(bool)
