"""Checks whether an image of the drawn world shows what its prompt demands.

The checker reads only pixels. It separates every pixel into background and one palette colour, and
groups the covered pixels into connected components. Each component is moved and scaled to a fixed
centroid and area. Its shape is that of the template with the largest overlap. Coverage is soft, so
the mild blur and noise of an image codec change little.

The rules are GenEval's (two objects, counting, colours, position, attribute binding), made strict
by default: the image may show nothing that is not demanded.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import as_strided
from scipy import ndimage

from corl_jax.data.drawn_world.coverage import COVERED, grow_masks, separate_colors
from corl_jax.data.drawn_world.scene import (
    COLORS,
    SHAPES,
    Object,
    Scene,
    Spec,
    find_relations,
    render,
)

MIN_AREA = 24 / 64**2  # smaller ones are specks; the smallest drawn object has four times this
MIN_OVERLAP = 0.75  # soft IoU; below, a component is an object of no known shape
ONE_COLOR = 0.75  # share of its pixels that must agree for a component to be one object
GRID = 24  # samples per side when a component is compared with the templates
REACH = 1.1  # half the compared window, in units of the square root of the area
STEPS = np.linspace(-REACH, REACH, GRID)
BLURS = (0.0, 0.8, 1.5)  # pixels, standard deviation; each shape has a template for each
UNKNOWN = "unknown"
PIXELS_AT_ONCE = 64 * 64**2  # the arrays of a chunk of images fit a processor's cache
MOST_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Detection:
    """A detected object. Lengths are fractions of the image side; overlap is the soft IoU."""

    shape: str
    color: str
    center: tuple[float, float]  # x, y
    box: tuple[float, float, float, float]  # left, top, right, bottom
    area: float
    overlap: float


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Large connected parts of masks [N, H, W], C in all."""

    labels: np.ndarray  # [N, H, W], the number of the part that a pixel belongs to, 0 outside
    numbers: np.ndarray  # [C], those of the large parts
    masks: np.ndarray  # [C], which mask each part is of
    votes: np.ndarray  # [C, colors], pixels of each colour
    boxes: np.ndarray  # [C, 4], first row, last row, first column, last column


@dataclasses.dataclass(frozen=True)
class _Objects:
    """Cut-out objects, C in all. Their windows, [C, S, T], are as large as the largest needs.

    Beyond the limits an object's window is not sampled. They are the box of the connected part
    that the object is of, and one pixel more.
    """

    images: np.ndarray  # [C], numbers of the images
    colors: np.ndarray  # [C], palette indices
    soft: np.ndarray  # [C, S, T] float32, the coverage in and beside the object, elsewhere 0
    origins: np.ndarray  # [C, 2], row and column of a window's first pixel
    boxes: np.ndarray  # [C, 4] first row, last row, first column, last column; in the window
    limits: np.ndarray  # [C, 4], in the same order


def detect(image: np.ndarray) -> list[Detection]:
    """Returns the objects in an image, uint8 [H, W, 3], from left to right."""
    return detect_all(image[None])[0]


def detect_all(images: np.ndarray) -> list[list[Detection]]:
    """Returns the objects in each image, uint8 [N, H, W, 3], from left to right."""
    at_once = max(1, PIXELS_AT_ONCE // max(1, images.shape[1] * images.shape[2]))
    chunks = [images[start : start + at_once] for start in range(0, len(images), at_once)]
    _make_templates()  # here, because threads that start together would each make them
    # NumPy computes arrays of this size without Python's lock, so that threads help.
    with ThreadPoolExecutor(min(MOST_THREADS, len(chunks)) or 1) as pool:
        return [objects for part in pool.map(_detect_in_chunk, chunks) for objects in part]


def _detect_in_chunk(images: np.ndarray) -> list[list[Detection]]:
    count, height, width = images.shape[:3]
    coverage, colors = separate_colors(images)
    least = MIN_AREA * height * width
    parts = _find_parts(coverage > COVERED, colors, least)
    detections: list[list[Detection]] = [[] for _ in range(count)]
    # An image of noise has many parts. A few at once, of about one size, need little memory.
    order = (parts.boxes[:, 1::2] - parts.boxes[:, ::2]).max(1).argsort()
    for start in range(0, len(order), 4 * count):
        objects = _cut_out(coverage, colors, parts, order[start : start + 4 * count], least)
        for image, detection in _describe(objects, height, width):
            detections[image].append(detection)
    for objects_of_image in detections:
        objects_of_image.sort(key=lambda detection: detection.center)
    return detections


def _describe(objects: _Objects, height: int, width: int) -> Iterator[tuple[int, Detection]]:
    """Yields each object with the number of its image."""
    y, x, area = _find_centroids(objects.soft)
    windows = _sample_windows(objects.soft, y, x, area, objects.limits)
    shapes, overlaps = _classify_shapes(windows)
    # The planes begin one pixel outside of the image.
    top, left = objects.origins.T - 1
    columns = (
        objects.images,
        shapes,
        objects.colors,
        (left + x + 0.5) / width,
        (top + y + 0.5) / height,
        (left + objects.boxes[:, 2]) / width,
        (top + objects.boxes[:, 0]) / height,
        # The edge behind the last pixel.
        (left + objects.boxes[:, 3] + 1) / width,
        (top + objects.boxes[:, 1] + 1) / height,
        area / (height * width),
        overlaps,
    )
    for row in zip(*(column.tolist() for column in columns), strict=True):
        image, shape, color, *center, first, second, third, fourth, share, overlap = row
        name = SHAPES[shape] if overlap >= MIN_OVERLAP else UNKNOWN
        box = first, second, third, fourth
        yield image, Detection(name, COLORS[color], tuple(center), box, share, overlap)


def _find_parts(masks: np.ndarray, colors: np.ndarray, least: float) -> _Parts:
    """Finds the 4-connected parts of at least `least` pixels in masks [N, H, W].

    The masks must have an empty rim. `colors` are palette indices, uint8 [N, H, W].
    """
    _, height, width = masks.shape
    labels = np.zeros(masks.shape, np.int32)
    # The masks one below the other are one mask. The rims keep their parts apart.
    ndimage.label(masks.reshape(-1, width), output=labels.reshape(-1, width))
    places, flat = np.flatnonzero(masks), labels.reshape(-1)
    shape = (labels.max(initial=0) + 1, len(COLORS))
    kinds = flat[places] * np.int64(shape[1]) + colors.reshape(-1)[places]
    votes = np.bincount(kinds, minlength=shape[0] * shape[1]).reshape(shape)
    numbers = np.flatnonzero(votes.sum(1) >= least)
    # Boxes need only the ends of runs in rows. The rims keep runs of two rows apart.
    covered = masks.reshape(-1)
    starts = np.flatnonzero(covered[1:] > covered[:-1]) + 1
    ends = np.flatnonzero(covered[1:] < covered[:-1])
    part, rows = flat[starts], starts // width
    boxes = np.full((4, shape[0]), masks.size)
    boxes[1::2] = 0
    for edge, choose, values in (
        (0, np.minimum, rows),
        (1, np.maximum, rows),
        (2, np.minimum, starts - rows * width),
        (3, np.maximum, ends - rows * width),
    ):
        choose.at(boxes[edge], part, values)
    boxes = boxes[:, numbers]
    owner = boxes[0] // height
    boxes[:2] -= owner * height
    return _Parts(labels, numbers, owner, votes[numbers], boxes.T)


def _take_windows(planes: np.ndarray, numbers, origins: np.ndarray, size) -> np.ndarray:
    """Returns the window at each origin, [C, S, T], of the plane of its number in [N, H, W]."""
    _, height, width = planes.shape
    flat = planes.reshape(-1)
    # Row i of the view is the pixels i, i + 1, .., so that whole rows of windows are copied.
    view = as_strided(flat, (flat.size - size[1] + 1, size[1]), flat.strides * 2)
    rows = numbers * height + origins[:, 0]
    return view[(rows * width + origins[:, 1])[:, None] + np.arange(size[0]) * width]


def _cut_out(
    coverage: np.ndarray, colors: np.ndarray, parts: _Parts, chosen: np.ndarray, least: float
) -> _Objects:
    """Cuts out the objects of the chosen parts; separates objects of two colours that touch."""
    boxes, images, votes = parts.boxes[chosen], parts.masks[chosen], parts.votes[chosen]
    # One pixel more on each side; all windows as large as the largest, and inside of the planes.
    size = (boxes[:, 1::2] - boxes[:, ::2]).max(0) + 3
    origins = np.minimum(boxes[:, ::2] - 1, np.array(coverage.shape[1:]) - size)
    boxes = boxes - origins.repeat(2, axis=1)
    limits = boxes + np.array([-1, 1, -1, 1])
    labels = _take_windows(parts.labels, images, origins, size)
    inside = labels == parts.numbers[chosen][:, None, None]
    color = votes.argmax(1)
    # Pixels at soft edges can get a wrong colour, so a clear majority is enough.
    mixed = votes.max(1) < ONE_COLOR * votes.sum(1)
    owner = np.arange(len(chosen))
    if mixed.any():
        # One mask for each colour that is frequent in such a part.
        split, frequent = np.nonzero((votes >= least) & mixed[:, None])
        shown = _take_windows(colors, images[split], origins[split], size)
        pieces = _find_parts(inside[split] & (shown == frequent[:, None, None]), shown, least)
        inside_pieces = pieces.labels[pieces.masks] == pieces.numbers[:, None, None]
        owner = np.concatenate([owner[~mixed], split[pieces.masks]])
        color = np.concatenate([color[~mixed], frequent[pieces.masks]])
        inside = np.concatenate([inside[~mixed], inside_pieces])
        boxes = np.concatenate([boxes[~mixed], pieces.boxes])
    origins, images = origins[owner], images[owner]
    # The mask grown by one pixel: soft edges lie outside of it.
    soft = _take_windows(coverage, images, origins, size) * grow_masks(inside)
    return _Objects(images, color, soft, origins, boxes, limits[owner])


def _find_centroids(soft: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, column and area of each object in windows [C, S, T], in pixels."""
    rows, columns = soft.sum(2).astype(float), soft.sum(1).astype(float)
    area = rows.sum(1)
    y = rows @ np.arange(rows.shape[1]) / area
    x = columns @ np.arange(columns.shape[1]) / area
    return y, x, area


def _sample_windows(soft: np.ndarray, y, x, area, limits: np.ndarray) -> np.ndarray:
    """Samples windows [C, S, T] around the centroids, scaled by the area, [C, GRID * GRID]."""
    # Written out, because on a grid along the axes this takes a part of map_coordinates' time.
    count, height, width = soft.shape
    steps = STEPS * np.sqrt(area)[:, None]  # [C, GRID]
    row, above, below = _weigh_neighbors(y[:, None] + steps, limits[:, :2], height)
    column, before, behind = _weigh_neighbors(x[:, None] + steps, limits[:, 2:], width)
    row += np.arange(count)[:, None] * height
    flat = soft.reshape(-1, width)
    lines = flat.take(row, axis=0) * above[:, :, None]  # [C, GRID, T]
    lines += flat.take(row + 1, axis=0) * below[:, :, None]
    places = np.arange(count * GRID).reshape(count, GRID, 1) * width + column[:, None]
    samples = lines.reshape(-1).take(places)
    samples *= before[:, None]
    places += 1
    after = lines.reshape(-1).take(places)
    after *= behind[:, None]
    samples += after
    return samples.reshape(count, GRID * GRID)


def _weigh_neighbors(places: np.ndarray, limits: np.ndarray, length: int):
    """Returns the pixel before each place [C, GRID], its weight, and the weight of the next one.

    Places beyond the limits [C, 2] weigh nothing.
    """
    shown = (places >= limits[:, :1]) & (places <= limits[:, 1:])
    first = np.clip(places.astype(int), 0, length - 2)
    share = places - first
    weights = np.where(shown, 1 - share, 0.0), np.where(shown, share, 0.0)
    return first, *(weight.astype(np.float32) for weight in weights)


@functools.cache
def _make_templates() -> np.ndarray:
    """Makes windows of the renderer's shapes, [shapes * blurs, GRID * GRID]."""
    # Blurred as well: a codec blurs thin arms and small holes, which costs overlap.
    images = []
    for shape in SHAPES:
        drawn = render(Scene((Object(shape, "black", 0.5, 0.5, 0.3),), (255, 255, 255)))
        images += [ndimage.gaussian_filter(drawn, (blur, blur, 0)) for blur in BLURS]
    coverage, _ = separate_colors(np.stack(images))
    soft = coverage * grow_masks(coverage > COVERED)
    limits = np.tile([0, soft.shape[1] - 1, 0, soft.shape[2] - 1], (len(soft), 1))
    return _sample_windows(soft, *_find_centroids(soft), limits)


def _classify_shapes(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the most similar shape and its overlap, both [C]."""
    templates = _make_templates()
    # Soft IoU: sum of minima over sum of maxima. Together these are the sums of both windows.
    minima = np.empty((len(templates), len(windows)), np.float32)
    smaller = np.empty_like(windows)
    for template, row in zip(templates, minima, strict=True):
        np.minimum(windows, template, out=smaller).sum(1, out=row)
    overlap = minima / (windows.sum(1) + templates.sum(1)[:, None] - minima)
    overlap = overlap.reshape(len(SHAPES), len(BLURS), -1).max(1)
    return overlap.argmax(0), overlap.max(0)


def _select_matches(detections: list[Detection], entry: Spec) -> list[Detection]:
    color = entry.get("color")
    return [d for d in detections if d.shape == entry["class"] and color in (None, d.color)]


def satisfies(detections: list[Detection], spec: Spec, *, strict: bool = True) -> bool:
    """Returns whether the detected objects meet a demand; see `check_all`."""
    include = spec["include"]
    groups = [_select_matches(detections, entry) for entry in include]
    if any(len(group) < e["count"] for group, e in zip(groups, include, strict=True)):
        return False
    if spec["category"] == "counting" and len(groups[0]) != include[0]["count"]:
        return False
    if strict and len(detections) != sum(entry["count"] for entry in include):
        return False
    for group, entry in zip(groups, include, strict=True):
        if "position" not in entry:
            continue
        relation, other = entry["position"]
        if not any(relation in find_relations(a.box, b.box) for a in group for b in groups[other]):
            return False
    return True


def check(image: np.ndarray, spec: Spec | str, *, strict: bool = True) -> bool:
    """Returns whether an image, uint8 [H, W, 3], shows what the spec demands; see `check_all`."""
    return check_all(image[None], [spec], strict=strict)[0]


def check_all(
    images: np.ndarray, specs: Sequence[Spec | str], *, strict: bool = True
) -> list[bool]:
    """Returns whether each image, uint8 [N, H, W, 3], shows what its spec (dict or JSON) demands.

    strict: the image may show no other object. Otherwise GenEval's rule holds: only `counting`
    limits a number of objects, that of the counted shape.
    """
    demands = [json.loads(spec) if isinstance(spec, str) else spec for spec in specs]
    return [
        satisfies(detections, demand, strict=strict)
        for detections, demand in zip(detect_all(images), demands, strict=True)
    ]
