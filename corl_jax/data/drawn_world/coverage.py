"""Separates the pixels of drawn images into background and palette colours.

A pixel is taken for a mixture: background + coverage * (palette colour - background). Most pixels
of an image are background, so a cheap test finds those for which the mixture is computed.
"""

from __future__ import annotations

import numpy as np

from corl_jax.data.drawn_world.scene import PALETTE

BORDER = 2 / 64  # the frame whose median is the background, as a share of the side
COVERED = 0.5  # a pixel belongs to an object from this coverage on
PALETTE_COLORS = np.array(list(PALETTE.values()), np.float32)  # [colors, 3]


def separate_colors(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns coverage (float32) and palette index (uint8) of each pixel, [N, H + 2, W + 2].

    The planes have an empty rim. Both are 0 at pixels that are neither covered nor beside a covered
    one, apart from a few.
    """
    count, _, width, _ = images.shape
    planes = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    background = _find_backgrounds(planes)  # [3, N]
    toward = PALETTE_COLORS - background.T[:, None]  # [N, colors, 3]
    length = np.maximum((toward**2).sum(-1), 1.0)  # [N, colors]
    near = _find_candidates(planes, background, length.min(1))
    numbers = np.count_nonzero(near.reshape(count, -1), axis=1)
    padded = np.flatnonzero(near)
    # The places of the same pixels in images without rims, from those of their rows.
    image = np.repeat(np.arange(count), numbers)
    row = padded // (width + 2)  # of all planes, one below the other
    places = padded - 2 * row - (width + 1) - 2 * width * image
    away = planes.reshape(3, -1).take(places, axis=1).astype(np.float32)  # [3, K]
    offset = np.repeat(background, numbers, axis=1)
    away -= offset
    offset *= away
    share, color = _choose_colors(away, offset.sum(0), length, numbers)
    coverage, colors = np.zeros(near.shape, np.float32), np.zeros(near.shape, np.uint8)
    coverage.reshape(-1)[padded] = share
    colors.reshape(-1)[padded] = color
    return coverage, colors


def _find_backgrounds(planes: np.ndarray) -> np.ndarray:
    """Returns the median colour of the frame of each image, [3, N] float32, of uint8 [3, N, H, W].

    The border of an image shows only background.
    """
    edge = max(1, round(BORDER * planes.shape[2]))
    frame = (planes[:, :, :edge], planes[:, :, -edge:], planes[..., :edge], planes[..., -edge:])
    levels = np.concatenate([part.reshape(*planes.shape[:2], -1) for part in frame], axis=2)
    # numpy sorts float32 with vector instructions, and uint8 without.
    ordered = np.sort(levels.astype(np.float32), axis=2)
    # Opposite sides make the number of pixels even: the median lies between two.
    middle = ordered.shape[2] // 2
    return (ordered[..., middle - 1] + ordered[..., middle]) / 2


def _choose_colors(
    away: np.ndarray, shift: np.ndarray, length: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns coverage and palette index of K pixels by the best fit of pixel colours, [K].

    `away` [3, K] are the pixels minus their backgrounds, `shift` [K] the product of the two.
    `length` are squared distances of palette colours from the backgrounds, [N, colors], and
    `numbers` pixels of each image, [N].
    """
    smallest, chosen = np.full(len(shift), np.inf, np.float32), np.zeros(len(shift), np.float32)
    best = np.zeros(len(shift), np.uint8)
    for color, (red, green, blue) in enumerate(PALETTE_COLORS):
        # Pixel = background + coverage * toward: the least-squares coverage is dot / lengths. In
        # float32 dot is exact, since all terms are multiples of 1/4 below 2**20. Not a matrix
        # product, because BLAS would start threads for each chunk.
        dot = red * away[0]
        dot += green * away[1]
        dot += blue * away[2]
        dot -= shift
        lengths = np.repeat(length[:, color], numbers)
        share = dot / lengths
        np.clip(share, 0.0, 1.1, out=share)
        # |away - coverage * toward|^2 without |away|^2, which is the same for all colours:
        # coverage * (coverage * length - 2 * dot)
        residual = lengths
        residual *= share
        dot *= 2
        residual -= dot
        residual *= share
        closer = residual < smallest
        np.minimum(smallest, residual, out=smallest)
        np.copyto(chosen, share, where=closer)
        # The index ascends. This takes a third of the time of an assignment with a mask.
        np.maximum(best, closer.view(np.uint8) * np.uint8(color), out=best)
    return np.minimum(chosen, 1.0), best


def _find_candidates(planes: np.ndarray, background: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Finds all pixels that can be covered, and those beside them, [N, H + 2, W + 2].

    `planes` are the images, uint8 [3, N, H, W]. `length` is the smallest squared distance of a
    palette colour from the background [3, N].
    """
    _, count, height, width = planes.shape
    # coverage > COVERED needs |pixel - background|^2 > COVERED^2 * length, so in one channel at
    # least a third of it. The background may lie half a step above its floor.
    bound = np.maximum(np.floor(COVERED * np.sqrt(length / 3) - 0.5), 0).astype(np.uint8)
    near = np.zeros((count, height + 2, width + 2), bool)
    different = np.zeros(planes.shape[1:], bool)
    for plane, level in zip(planes, np.floor(background).astype(np.uint8), strict=True):
        level = level[:, None, None]
        difference = np.maximum(plane, level)
        difference -= np.minimum(plane, level)
        different |= difference >= bound[:, None, None]
    near[:, 1:-1, 1:-1] = different
    near = grow_masks(near)
    near[:, :: height + 1] = False
    near[:, :, :: width + 1] = False
    return near


def grow_masks(masks: np.ndarray) -> np.ndarray:
    """Adds to masks, [N, H, W] bool with empty rims, all pixels beside them, diagonal ones too."""
    # Written out, because this takes a small part of the time of scipy's binary_dilation. A shift
    # along the flat masks is one within each mask: what comes from another row is an empty rim.
    width, flat = masks.shape[2], masks.reshape(-1)
    tall = flat.copy()
    tall[width:] |= flat[:-width]
    tall[:-width] |= flat[width:]
    grown = tall.copy()
    grown[1:] |= tall[:-1]
    grown[:-1] |= tall[1:]
    return grown.reshape(masks.shape)
