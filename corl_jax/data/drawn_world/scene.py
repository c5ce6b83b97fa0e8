"""The drawn world: what a picture may demand (spec), what it holds (scene), and its pixels.

A world has a few shapes and colours on a light background; a picture holds one to four
objects that neither touch each other nor the border, none rotated. `FULL` has 5 shapes and
6 colours in any place. `SMALL`, for models that learn on a CPU, has 4 and 4, each object in one
of four cells, on pictures of half the side. A *spec* is a demand in
GenEval's words, `{"category": .., "include": [{"class", "count", "color"?, "position"?}, ..]}`,
where `position: [relation, j]` says how this entry lies relative to entry j. A *scene* fills in
what the spec leaves open (free colours, sizes, places).

Combinations per category (up to wording), full and small: single_object 5, 4; two_object 10, 6;
counting 15, 8; colors 30, 16; position 40, 24 without and 1,200, 288 with colours; color_attr
300, 72. The last two categories
have a held-out fifth (`is_held_out`); the other four are shared by all splits, because leaving out
a fifth of so few would leave out a whole shape or number.
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
SPLIT_CATEGORIES = ("position", "color_attr")
SPLITS = ("train", "test", "all")

HELD_OUT_ONE_IN = 5
MARGIN = 2 / 64  # kept free at the border, as a fraction of the image side
GAP = 4 / 64  # kept free between two objects' boxes, so that a lossy codec does not join them
SUPERSAMPLE = 4
RING_HOLE = 0.55  # inner radius over outer radius
CROSS_ARM = 0.34  # half the arm's width over half the cross's width
TRIANGLE_HEIGHT = 0.866  # over its width: equilateral

POSITION_THRESHOLD = 0.1  # GenEval's: offsets below this share of the summed sizes do not count
CLEAR_MAIN, CLEAR_OTHER = 0.6, 0.4  # what the renderer asks of a relation; GenEval's border is 0.5


@dataclasses.dataclass(frozen=True)
class World:
    """What images may show, where, and how questions about them are worded."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    max_count: int  # of equal objects that a demand counts
    sizes: dict[int, tuple[float, float]]  # range of an object's size, by number of objects
    image_size: int  # side in pixels of a picture unless another is asked for
    min_image_size: int  # below, the smallest objects are too few pixels for their shape to show
    cells: int | None = None  # each object is in one of cells x cells of its own; None: anywhere
    instructions: bool = True  # questions carry the published templates; False: they stand alone


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
    """Returns the name of the largest world whose shapes show in pictures of this side."""
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
        """Left, top, right, bottom."""
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
    """Offset of box a from box b as GenEval reduces it, in units of their distance.

    Source: GenEval, evaluation/evaluate_images.py, `relative_position`.
    """
    delta = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    dims = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    reduced = np.maximum(np.abs(delta) - POSITION_THRESHOLD * dims, 0) * np.sign(delta)
    x, y = reduced / max(float(np.linalg.norm(delta)), 1e-9)
    return float(x), float(y)


def find_relations(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """Returns the relations of box a to box b. On a diagonal there are two."""
    x, y = reduced_offset(a, b)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, held in zip(RELATIONS, holds, strict=True) if held}


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
    # For example: "a left of b" and "b right of a".
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
    p, q = a.box, b.box
    wide = max(p[0] - q[2], q[0] - p[2])
    high = max(p[1] - q[3], q[1] - p[3])
    return max(wide, high) >= GAP


def _place_in_cells(
    rng: np.random.Generator, kinds: list[tuple[str, str]], world: World
) -> list[Object]:
    """Places each object in a cell of its own, half the gap or more from the cell's border."""
    assert world.cells is not None
    side, (low, high) = 1 / world.cells, world.sizes[len(kinds)]
    placed = []
    for (shape, color), cell in zip(kinds, rng.permutation(world.cells**2), strict=False):
        size = float(rng.uniform(low, high))
        room = (side - GAP - size) / 2
        x, y = rng.uniform(-room, room, size=2)
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
            one = Object(shape, color, float(x), float(y), size)
            if all(_are_apart(one, other) for other in placed):
                placed.append(one)
                break
        else:
            return None
    return placed


def sample_scene(rng: np.random.Generator, spec: Spec, world: World = FULL) -> Scene:
    """Samples a scene with exactly what the spec demands.

    `spec["include"]` must demand one to four objects of the world in all.
    """
    kinds = _choose_kinds(rng, spec, world)
    wanted = spec["include"][-1].get("position")
    while True:
        objects = _place(rng, kinds, world)
        if objects is None:
            continue
        if wanted is None or find_clear_relation(objects[-1], objects[wanted[1]]) == wanted[0]:
            break
    background = int(rng.integers(236, 253)) + rng.integers(-3, 4, size=3)
    tints = rng.integers(-8, 9, size=(len(objects), 3))
    return Scene(
        tuple(objects),
        (int(background[0]), int(background[1]), int(background[2])),
        tuple((int(r), int(g), int(b)) for r, g, b in tints),
    )


def _draw_object(draw: ImageDraw.ImageDraw, one: Object, color, background, side: int) -> None:
    left, top, right, bottom = (v * side for v in one.box)
    x, y, half = one.x * side, one.y * side, one.size * side / 2
    if one.shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif one.shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=color)
    elif one.shape == "cross":
        arm = half * CROSS_ARM
        draw.rectangle((left, y - arm, right, y + arm), fill=color)
        draw.rectangle((x - arm, top, x + arm, bottom), fill=color)
    else:
        draw.ellipse((left, top, right, bottom), fill=color)
        if one.shape == "ring":
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
    for one, tint in zip(scene.objects, tints, strict=True):
        color = np.clip(np.add(PALETTE[one.color], tint), 0, 255)
        _draw_object(draw, one, tuple(int(c) for c in color), scene.background, side)
    return np.asarray(image.reduce(SUPERSAMPLE))
