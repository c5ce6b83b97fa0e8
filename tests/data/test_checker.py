"""The drawn world's checker on batches: hard images, borders, chunks, and neighbours in a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage

from corl_jax.data.drawn_world import checker, generator
from corl_jax.data.drawn_world.scene import COLORS, PALETTE

SIDE = 64
LIGHT = (248, 248, 248)


def paint(*areas, background=LIGHT):
    """Returns an image with rectangles (color, top, bottom, left, right) in pixels."""
    image = np.full((SIDE, SIDE, 3), background, np.uint8)
    for color, top, bottom, left, right in areas:
        image[top:bottom, left:right] = PALETTE[color]
    return image


def make_mosaic(tile, factor):
    """Returns an image of tiles whose colours follow from their places, blurred a little."""
    colors = (*PALETTE.values(), LIGHT, LIGHT, LIGHT)
    place = np.arange(SIDE) // tile
    number = (factor * place[:, None] ** 2 + 3 * place + place[:, None] * place**2) % len(colors)
    image = np.array(colors, float)[number]
    return ndimage.gaussian_filter(image, (0.6, 0.6, 0)).astype(np.uint8)


def make_hard_images():
    rng = np.random.default_rng(3)
    rows = [generator.make_row(4, i, encode=False)["real_image"] for i in range(8)]
    drawn = np.stack(rows)
    noisy = np.clip(drawn + rng.normal(0, 40, drawn.shape), 0, 255).astype(np.uint8)
    random = rng.integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    soft = ndimage.gaussian_filter(rng.normal(size=(4, SIDE, SIDE, 3)), (0, 2, 2, 0))
    soft = np.clip(128 + 90 * soft / soft.std(), 0, 255).astype(np.uint8)
    mosaics = [make_mosaic(tile, factor) for tile in (4, 8, 16) for factor in (1, 2)]
    return np.concatenate([
        drawn, noisy, np.minimum(drawn, drawn[::-1]), np.roll(drawn, (24, 32), (1, 2)), 255 - drawn,
        random, soft, np.stack(mosaics), np.full((1, SIDE, SIDE, 3), 250, np.uint8),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return make_hard_images()


def list_what_and_where(detections):
    listed = [(d.color, d.box, d.shape, d.center, d.area, d.overlap) for d in detections]
    return sorted(listed, key=lambda row: row[:3])


def assert_equal_detections(first, second):
    for one, other in zip(list_what_and_where(first), list_what_and_where(second), strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_allclose(np.hstack(one[3:]), np.hstack(other[3:]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("images_at_once", [1, 2, 5, 1000])
def test_a_batch_gives_what_each_image_gives_alone(images, images_at_once, monkeypatch):
    alone = [checker.detect(image) for image in images]
    assert sum(map(len, alone)) > 200
    monkeypatch.setattr(checker, "PIXELS_AT_ONCE", images_at_once * SIDE**2)
    together = checker.detect_all(images)
    assert len(together) == len(images)
    for first, second in zip(alone, together, strict=True):
        assert_equal_detections(first, second)


def test_no_image_and_one_image():
    assert checker.detect_all(np.zeros((0, SIDE, SIDE, 3), np.uint8)) == []
    assert checker.check_all(np.zeros((0, SIDE, SIDE, 3), np.uint8), []) == []
    (found,) = checker.detect_all(paint(("red", 20, 40, 20, 40))[None])
    assert [(d.shape, d.color) for d in found] == [("square", "red")]


def test_objects_at_borders_do_not_join_those_of_neighbours_in_the_batch():
    bottom, top = ("red", 44, 64, 20, 40), ("red", 0, 20, 20, 40)
    right, left = ("blue", 20, 40, 44, 64), ("blue", 20, 40, 0, 20)
    blank = paint()
    batch = [paint(bottom), paint(top), paint(right), paint(left), blank, paint(top, bottom)]
    found = checker.detect_all(np.stack(batch))
    boxes = [[d.box for d in detections] for detections in found]
    across, low, high = (20 / 64, 40 / 64), (0.0, 20 / 64), (44 / 64, 1.0)
    above, below = (across[0], low[0], across[1], low[1]), (across[0], high[0], across[1], high[1])
    beside = [(low[0], across[0], low[1], across[1]), (high[0], across[0], high[1], across[1])]
    assert boxes[:5] == [[below], [above], [beside[1]], [beside[0]], []]
    assert sorted(boxes[5]) == sorted([above, below])
    assert {d.shape for detections in found for d in detections} == {"square"}


def test_touching_colors_share_the_soft_edge_of_one_pixel():
    # Each square has 20 x 20 pixels. Its edge, one pixel wide, holds a column of the other one.
    image = paint(("red", 10, 30, 8, 28), ("blue", 10, 30, 28, 48))
    red, blue = checker.detect(image)
    assert (red.color, blue.color) == ("red", "blue")
    assert red.box == (8 / 64, 10 / 64, 28 / 64, 30 / 64)
    assert blue.box == (28 / 64, 10 / 64, 48 / 64, 30 / 64)
    for detection, center in ((red, 18.5), (blue, 37.5)):  # columns 8 to 28, and 27 to 47
        assert detection.area == pytest.approx(21 * 20 / 64**2)
        assert detection.center == pytest.approx((center / 64, 20 / 64))


@pytest.mark.parametrize("color", COLORS)
def test_objects_show_on_a_background_of_any_color(color):
    """A palette colour as background is at no distance from itself."""
    for other in COLORS:
        found = checker.detect(paint((other, 16, 40, 12, 36), background=PALETTE[color]))
        if other == color:
            assert found == []
        else:
            (detection,) = found
            assert detection.shape == "square" and detection.box == (12 / 64, 0.25, 36 / 64, 0.625)


def test_specks_count_from_24_pixels_on():
    assert checker.detect(paint(("red", 10, 14, 10, 15), ("blue", 30, 33, 30, 37))) == []
    (found,) = checker.detect(paint(("green", 10, 14, 10, 16)))
    assert found.color == "green"


def test_mosaics_hold_what_they_always_held():
    """The numbers are those of a checker that treats one component at a time."""
    expected = {
        (4, 1): (32, 2, 19.1879, 0.60930),
        (4, 2): (38, 4, 23.6665, 0.66068),
        (4, 5): (21, 2, 13.4008, 0.56875),
        (8, 1): (37, 31, 31.4721, 0.87653),
        (8, 2): (33, 22, 26.8192, 0.77527),
        (8, 5): (34, 22, 26.4363, 1.01606),
        (16, 1): (8, 7, 7.2271, 0.59657),
        (16, 2): (7, 6, 6.2988, 0.77712),
        (16, 5): (6, 4, 4.5699, 0.67816),
    }  # fmt: skip
    for (tile, factor), (objects, squares, overlap, area) in expected.items():
        found = checker.detect(make_mosaic(tile, factor))
        assert len(found) == objects
        assert sum(d.shape == "square" for d in found) == squares
        assert sum(d.overlap for d in found) == pytest.approx(overlap, abs=2e-4)
        assert sum(d.area for d in found) == pytest.approx(area, abs=2e-5)


def test_verdicts_of_a_batch_are_those_of_its_rows():
    rows = [generator.make_row(6, i, encode=False) for i in range(40)]
    images = np.stack([row["real_image"] for row in rows])
    specs = [row["spec"] for row in rows]
    assert all(checker.check_all(images, specs))
    assert all(checker.check_all(images, [json.loads(spec) for spec in specs]))
    moved = specs[3:] + specs[:3]
    for strict in (True, False):
        verdicts = checker.check_all(images, moved, strict=strict)
        pairs = zip(images, moved, strict=True)
        assert verdicts == [checker.check(i, s, strict=strict) for i, s in pairs]
        assert 0 <= sum(verdicts) < 10
    with pytest.raises(ValueError, match="zip"):
        checker.check_all(images, specs[1:])
