"""From bytes to instances: resizing as OpenCV, mmdetection's selection, masks and boxes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from corl_jax.devices.mesh import batch_sharding
from corl_jax.models import instances
from corl_jax.models.instances import Instances
from corl_jax.models.mask2former import resize_map

# By OpenCV 5.0: cv2.resize(pixels, (7, 5), interpolation=cv2.INTER_LINEAR)
PIXELS = [[115, 238, 130], [23, 192, 60]]
RESIZED = [
    [115, 133, 185, 238, 191, 145, 130], [106, 124, 178, 233, 186, 139, 123],
    [69, 90, 152, 215, 163, 112, 95], [32, 56, 126, 197, 141, 85, 67],
    [23, 47, 119, 192, 135, 79, 60],
]  # fmt: skip


def test_bytes_are_resized_as_by_opencv():
    pixels = np.array(PIXELS, np.uint8)[None, :, :, None]
    assert instances.resize_bytes(pixels, (5, 7))[0, :, :, 0].tolist() == RESIZED
    # Rounding once, at the end, gives other bytes for an eighth of all pixels.
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 24, 20, 3), np.uint8)
    found = np.asarray(instances.resize_bytes(pixels, (50, 41))).astype(int)
    smooth = np.asarray(resize_map(pixels.astype(np.float32), (50, 41)))
    assert np.abs(found - smooth).max() < 1.3 and (found != np.rint(smooth)).mean() > 0.05
    assert instances.resize_bytes(pixels, (24, 20)) is pixels


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((384, 384), (800, 800)), ((200, 600), (444, 1333)), ((1024, 768), (1067, 800))],
)
def test_images_just_fit(sides, expected):
    assert instances.fit_sides(sides, 800, 1333) == expected


def test_pixels_are_normalised_and_padded_with_zeros():
    pixels = instances.prepare_pixels(np.full((1, 10, 12, 3), 200, np.uint8), (40, 48))
    assert pixels.shape == (1, 64, 64, 3)
    expected = (200 - np.array(instances.MEAN)) / np.array(instances.DEVIATION)
    np.testing.assert_allclose(pixels[0, 0, 0], expected, rtol=1e-6)
    assert (pixels[0, 40:] == 0).all() and (pixels[0, :, 48:] == 0).all()


def mmdet_instances(classes, masks, padded, resized, sides):
    """mmdetection's steps one by one, in PyTorch, without a shortcut."""
    out = []
    for logits, mask in zip(torch.from_numpy(classes), torch.from_numpy(masks), strict=True):
        mask = interpolate(mask[None], padded, mode="bilinear", align_corners=False)
        mask = mask[:, :, : resized[0], : resized[1]]
        mask = interpolate(mask, sides, mode="bilinear", align_corners=False)[0]
        probabilities = logits.softmax(-1)[:, :-1]
        scores, index = probabilities.flatten().topk(min(100, probabilities.numel()))
        for score, number in zip(scores.tolist(), index.tolist(), strict=True):
            query, label = divmod(number, probabilities.shape[1])
            inside = mask[query] > 0
            own = (mask[query].sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            rows, columns = (
                np.nonzero(inside.any(1).numpy())[0],
                np.nonzero(inside.any(0).numpy())[0],
            )
            box = [0, 0, 0, 0]
            if len(rows):
                box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            out.append((query, label, score * own.item(), [int(x) for x in box], inside.numpy()))
    return out


@pytest.mark.parametrize("sides", [(20, 30), (90, 45)], ids=["enlarged", "reduced"])
def test_instances_are_those_of_mmdetection(sides):
    rng = np.random.default_rng(1)
    resized = instances.fit_sides(sides, 40, 66)
    padded = tuple(-(-side // 32) * 32 for side in resized)
    shape = (padded[0] // 4, padded[1] // 4)
    classes = 2 * rng.standard_normal((2, 23, 8), np.float32)
    masks = rng.standard_normal((2, 23, *shape), np.float32)
    masks[0, 3] = -1  # an empty mask has no box and no score
    selected = jax.jit(instances.select_instances, static_argnums=(2, 3, 4))
    found = jax.tree.map(np.asarray, selected(classes, masks, padded, resized, sides))
    wanted = mmdet_instances(classes, masks, padded, resized, sides)
    assert found.scores.shape == (2, 100) and found.masks.shape == (
        2,
        23,
        sides[0],
        -(-sides[1] // 8),
    )
    expected = iter(wanted)
    for image in range(2):
        for place in range(100):
            query, label, score, box, mask = next(expected)
            assert (found.queries[image, place], found.labels[image, place]) == (query, label)
            assert found.scores[image, place] == pytest.approx(score, abs=1e-6)
            assert found.boxes[image, query].tolist() == box
            own = instances.unpack_mask(found.masks[image, query], sides[1])
            assert own.shape == sides and (own == mask).mean() > 0.999
    assert found.boxes[0, 3].tolist() == [0, 0, 0, 0]


def test_a_mesh_changes_nothing(mesh):
    rng = np.random.default_rng(2)
    classes = rng.standard_normal((8, 5, 4), np.float32)
    masks = rng.standard_normal((8, 5, 8, 8), np.float32)
    select = jax.jit(lambda c, m: instances.select_instances(c, m, (32, 32), (30, 30), (15, 15)))
    alone = select(classes, masks)
    with jax.set_mesh(mesh):
        place = batch_sharding(mesh)
        split = select(jax.device_put(classes, place), jax.device_put(masks, place))
    assert isinstance(split, Instances)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), alone, split)
