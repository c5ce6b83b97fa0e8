"""The drawn world: demands on images (specs), the content of images (scenes), and their pixels.

A world has a few shapes and colours on a light background. An image has one to four objects. They
are not rotated and touch neither each other nor the border. `FULL` has 5 shapes and 6 colours in
any place. `SMALL` is for models that learn on a CPU. It has 4 shapes and 4 colours, in images of
half the side with four cells.

A *spec* is a demand in the form of GenEval:
`{"category": .., "include": [{"class", "count", "color"?, "position"?}, ..]}`. `position:
[relation, j]` is the relation of this entry to entry j. A *scene* adds all that the spec leaves
open: other colours, sizes and places.

Combinations per category (up to wording), full and small: single_object 5, 4; two_object 10, 6;
counting 15, 8; colors 30, 16; position 40, 24 without and 1,200, 288 with colours; color_attr
300, 72. A fifth of the combinations of the last two categories is held out (`is_held_out`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Spec = dict[str, Any]

SHAPES = ("circle", "square", "triangle", "cross", "ring")
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 205, 30),
    "purple": (160, 50, 185),
    "black": (30, 30, 30),
}
COLORS = tuple(PALETTE)
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
# The other four have few combinations: a fifth of them would be a whole shape or number.
SPLIT_CATEGORIES = ("position", "color_attr")
SPLITS = ("train", "test", "all")

HELD_OUT_ONE_IN = 5
MARGIN = 2 / 64  # kept free at the border, as a fraction of the image side
GAP = 4 / 64  # kept free between two objects' boxes, so that a lossy codec does not join them
SUPERSAMPLE = 4  # rendered at four times the side, then reduced: Pillow's shapes have hard edges
RING_HOLE = 0.55  # inner radius over outer radius
CROSS_ARM = 0.34  # half the arm's width over half the cross's width
TRIANGLE_HEIGHT = 0.866  # over its width: equilateral

POSITION_THRESHOLD = 0.1  # GenEval's: offsets below this share of the summed sizes do not count
CLEAR_MAIN, CLEAR_OTHER = 0.6, 0.4  # bounds of rendered relations; GenEval's border is 0.5


@dataclasses.dataclass(frozen=True)
class World:
    """The content of images, its places, and the wording of questions."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    max_count: int  # largest number in demands of the category `counting`
    sizes: dict[int, tuple[float, float]]  # range of an object's size, by number of objects
    image_size: int  # default side of an image in pixels
    min_image_size: int  # with fewer pixels the shapes of the smallest objects do not show
    cells: int | None = None  # a grid of cells x cells with one object a cell; None: any place
    instructions: bool = True  # whether questions have the published templates


FULL = World(
    shapes=SHAPES,
    colors=COLORS,
    max_count=4,
    sizes={1: (0.34, 0.56), 2: (0.28, 0.42), 3: (0.26, 0.36), 4: (0.25, 0.33)},
    image_size=64,
    min_image_size=48,
)
SMALL = World(
    shapes=("circle", "square", "triangle", "cross"),
    colors=("red", "green", "blue", "yellow"),
    max_count=3,
    sizes=dict.fromkeys((1, 2, 3), (0.37, 0.42)),  # of a cell's 0.5
    image_size=32,
    min_image_size=32,
    cells=2,
    instructions=False,
)
WORLDS = {"full": FULL, "small": SMALL}


def choose_world(image_size: int) -> str:
    """Returns the name of the largest world whose shapes show in images of this side."""
    return "full" if image_size >= FULL.min_image_size else "small"


@dataclasses.dataclass(frozen=True)
class Object:
    """An object. The centre x, y and the width `size` are fractions of the image side."""

    shape: str
    color: str
    x: float
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The edges (left, top, right, bottom)."""
        height = self.size * (TRIANGLE_HEIGHT if self.shape == "triangle" else 1.0)
        return (
            self.x - self.size / 2,
            self.y - height / 2,
            self.x + self.size / 2,
            self.y + height / 2,
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of an image. Colours are RGB, 0..255."""

    objects: tuple[Object, ...]
    background: tuple[int, int, int] = (248, 248, 248)
    tints: tuple[tuple[int, int, int], ...] = ()  # added to each object's palette colour


def reduced_offset(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float]:
    """Computes the offset of box a from box b as GenEval reduces it, in units of their distance.

    Source: GenEval, evaluation/evaluate_images.py, `relative_position`.
    """
    delta = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    dims = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    # An offset below POSITION_THRESHOLD of the summed sides counts as 0 on that axis.
    reduced = np.maximum(np.abs(delta) - POSITION_THRESHOLD * dims, 0) * np.sign(delta)
    x, y = reduced / max(float(np.linalg.norm(delta)), 1e-9)
    return float(x), float(y)


def find_relations(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """Returns the relations of box a to box b. On a diagonal there are two."""
    x, y = reduced_offset(a, b)
    conditions = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)  # in the order of RELATIONS
    return {name for name, holds in zip(RELATIONS, conditions, strict=True) if holds}


def find_clear_relation(a: Object, b: Object) -> str | None:
    """Returns the relation of a to b if it is clear to every reader, else None."""
    x, y = reduced_offset(a.box, b.box)
    if abs(x) >= CLEAR_MAIN and abs(y) <= CLEAR_OTHER:
        return "left of" if x < 0 else "right of"
    if abs(y) >= CLEAR_MAIN and abs(x) <= CLEAR_OTHER:
        return "above" if y < 0 else "below"
    return None


def _pick(rng: np.random.Generator, items: tuple[str, ...], count: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:count]]


def sample_spec(rng: np.random.Generator, category: str | None = None, world: World = FULL) -> Spec:
    """Samples a demand of a category. None: of all categories, equally likely."""
    category = category or CATEGORIES[int(rng.integers(len(CATEGORIES)))]
    pair = category in ("two_object", "position", "color_attr")
    shapes = _pick(rng, world.shapes, 2 if pair else 1)
    count = int(rng.integers(2, world.max_count + 1)) if category == "counting" else 1
    include: list[Spec] = [{"class": shape, "count": count} for shape in shapes]
    # A position names colours in half of the captions, as GenEval's position never does.
    if category in ("colors", "color_attr") or (category == "position" and rng.integers(2)):
        for entry, color in zip(include, _pick(rng, world.colors, len(include)), strict=True):
            entry["color"] = color
    if category == "position":
        include[1]["position"] = [RELATIONS[int(rng.integers(4))], 0]
    return {"category": category, "include": include}


def normalize_spec(spec: Spec) -> str:
    """Returns a text that is equal for demands with the same meaning."""
    # "a left of b" and "b right of a" -> the same text: relations become "left of" or "above", and
    # entries without a relation are sorted.
    include = [dict(entry) for entry in spec["include"]]
    relation = include[-1].pop("position", [None])[0]
    if relation in ("right of", "below"):
        relation = {"right of": "left of", "below": "above"}[relation]
        include.reverse()
    if relation is None:
        include.sort(key=lambda entry: (entry["class"], entry.get("color", "")))
    return json.dumps([spec["category"], relation, include], sort_keys=True)


def is_held_out(spec: Spec) -> bool:
    """Returns whether a demand belongs to the test split only; False in shared categories."""
    if spec["category"] not in SPLIT_CATEGORIES:
        return False
    # A hash, not a random choice: the split of a demand depends on the demand alone. Not Python's
    # hash(), which differs from process to process.
    digest = hashlib.sha256(normalize_spec(spec).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def is_in_split(spec: Spec, split: str) -> bool:
    """Returns whether rows of the split may have this demand."""
    shared = spec["category"] not in SPLIT_CATEGORIES
    return split == "all" or shared or is_held_out(spec) == (split == "test")


def _choose_kinds(rng: np.random.Generator, spec: Spec, world: World) -> list[tuple[str, str]]:
    """Returns shape and colour of each object; samples colours that the spec leaves open."""
    shapes = [(e["class"], e.get("color")) for e in spec["include"] for _ in range(e["count"])]
    free = [world.colors[i] for i in rng.integers(len(world.colors), size=len(shapes))]
    if spec["category"] == "counting" and rng.integers(2):
        free = free[:1] * len(shapes)
    return [(shape, color or other) for (shape, color), other in zip(shapes, free, strict=True)]


def _are_apart(a: Object, b: Object) -> bool:
    """Returns whether the gap between two boxes is large enough."""
    # The gap along each axis is negative where the boxes overlap; one large gap is enough.
    p, q = a.box, b.box
    wide = max(p[0] - q[2], q[0] - p[2])
    high = max(p[1] - q[3], q[1] - p[3])
    return max(wide, high) >= GAP


def _place_in_cells(
    rng: np.random.Generator, kinds: list[tuple[str, str]], world: World
) -> list[Object]:
    """Places each object in another cell, with at least half the gap to the cell's border."""
    assert world.cells is not None
    side, (low, high) = 1 / world.cells, world.sizes[len(kinds)]
    placed = []
    for (shape, color), cell in zip(kinds, rng.permutation(world.cells**2), strict=False):
        size = float(rng.uniform(low, high))
        room = (side - GAP - size) / 2
        x, y = rng.uniform(-room, room, size=2)
        # cells = 2: cell 2 -> row 1, column 0
        row, column = divmod(int(cell), world.cells)
        center = (column + 0.5) * side + float(x), (row + 0.5) * side + float(y)
        placed.append(Object(shape, color, *center, size))
    return placed


def _place(
    rng: np.random.Generator, kinds: list[tuple[str, str]], world: World
) -> list[Object] | None:
    """Tries to place all objects once; returns None if two are too close."""
    if world.cells is not None:
        return _place_in_cells(rng, kinds, world)
    low, high = world.sizes[len(kinds)]
    placed: list[Object] = []
    for shape, color in kinds:
        for _ in range(10):
            size = float(rng.uniform(low, high))
            x, y = rng.uniform(MARGIN + size / 2, 1 - MARGIN - size / 2, size=2)
            candidate = Object(shape, color, float(x), float(y), size)
            if all(_are_apart(candidate, other) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def sample_scene(rng: np.random.Generator, spec: Spec, world: World = FULL) -> Scene:
    """Samples a scene with exactly what the spec demands.

    `spec["include"]` must demand one to four objects of the world in all.
    """
    kinds = _choose_kinds(rng, spec, world)
    position = spec["include"][-1].get("position")
    # Objects are placed at random until the relation is clear to every reader.
    while True:
        objects = _place(rng, kinds, world)
        if objects is None:
            continue
        if position is None:
            break
        relation, other = position
        if find_clear_relation(objects[-1], objects[other]) == relation:
            break
    background = int(rng.integers(236, 253)) + rng.integers(-3, 4, size=3)
    tints = rng.integers(-8, 9, size=(len(objects), 3))
    return Scene(
        tuple(objects),
        (int(background[0]), int(background[1]), int(background[2])),
        tuple((int(r), int(g), int(b)) for r, g, b in tints),
    )


def _draw_object(draw: ImageDraw.ImageDraw, item: Object, color, background, side: int) -> None:
    left, top, right, bottom = (v * side for v in item.box)
    x, y, half = item.x * side, item.y * side, item.size * side / 2
    if item.shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif item.shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=color)
    elif item.shape == "cross":
        arm = half * CROSS_ARM
        draw.rectangle((left, y - arm, right, y + arm), fill=color)
        draw.rectangle((x - arm, top, x + arm, bottom), fill=color)
    else:
        draw.ellipse((left, top, right, bottom), fill=color)
        if item.shape == "ring":
            hole = half * RING_HOLE
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)


def render(scene: Scene | Spec, image_size: int = 64, seed: int = 0) -> np.ndarray:
    """Renders a scene, or a scene sampled for a spec: uint8 [image_size, image_size, 3]."""
    if not isinstance(scene, Scene):
        scene = sample_scene(np.random.default_rng(seed), scene)
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    tints = scene.tints or ((0, 0, 0),) * len(scene.objects)
    for item, tint in zip(scene.objects, tints, strict=True):
        color = np.clip(np.add(PALETTE[item.color], tint), 0, 255)
        _draw_object(draw, item, tuple(int(c) for c in color), scene.background, side)
    return np.asarray(image.reduce(SUPERSAMPLE))
