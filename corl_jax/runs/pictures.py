"""Draws pages of images with text, and formats tables of answers, for files and TensorBoard.

The PNG file of a page says where each image is on it, with its prompt, verdict and rewards, so that
`corl-jax report` can show the images one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from corl_jax.atomic_files import replace_file
from corl_jax.fonts import make_drawable

CELL = 128  # pixels; smaller images are enlarged by a whole factor, so that text fits below
FONT_SIZE = 12
LINE = FONT_SIZE + 3  # height of a line of text
MARGIN = 8
FRAME = 3  # width of a frame; two fit between images
HELD_OUT = "held_out"
"""Files `held_out_STEP.png` show images of an evaluation."""
NOTES_KEY = "corl_jax"
"""Name of the text chunk of a PNG file that has the notes of a page."""
MAX_CAPTION = 2000  # characters of a prompt in the notes
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
GOOD, BAD = (20, 120, 50), (190, 30, 30)
"""Colors of frames and texts: green and red."""
TEXT_WIDTH = 260  # pixels of the texts beside an image

Color = tuple[int, int, int]
Rewards = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image of a page and the lines of text below it."""

    pixels: np.ndarray  # [H, W, 3] uint8
    lines: Sequence[tuple[str, Color]] = ()
    frame: Color | None = None
    caption: str = ""  # the whole prompt, for the notes of the page
    passed: bool | None = None  # the verdict, if there is one
    rewards: Rewards = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The place of an image on a page, and what is known of it."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the page
    scale: int  # factor by which the image is enlarged there
    row: int
    caption: str
    passed: bool | None
    rewards: Rewards  # NaN: does not apply

    def to_json(self) -> dict[str, Any]:
        """Returns the tile as JSON values; NaN becomes null."""
        rewards = {k: None if math.isnan(v) else float(v) for k, v in self.rewards.items()}
        return {**dataclasses.asdict(self), "rewards": rewards}


@dataclasses.dataclass(frozen=True)
class Page:
    """A drawn page."""

    pixels: np.ndarray  # [H, W, 3] uint8
    title: str
    tiles: Sequence[Tile]

    def format_notes(self) -> str:
        """Returns title and tiles as JSON, for the PNG file."""
        tiles = [tile.to_json() for tile in self.tiles]
        return json.dumps({"title": self.title, "tiles": tiles}, allow_nan=False)


def draw_page(
    rows: Sequence[Sequence[Cell]], heads: Sequence[Sequence[str]] | None = None, title: str = ""
) -> Page:
    """Draws a grid of images of equal size.

    `heads`: lines of text above each row. The title stands above all rows.
    """
    heads = heads or [()] * len(rows)
    width, height = _compute_displayed_size(rows[0][0].pixels)
    scale = width // rows[0][0].pixels.shape[1]
    page_width = MARGIN + max(map(len, rows)) * (width + MARGIN)
    num_lines = max((len(cell.lines) for row in rows for cell in row), default=0)
    # A frame reaches above its image, so there is room for it below a head.
    head_heights = [len(head) * LINE + FRAME * bool(head) for head in heads]
    row_heights = [head + height + num_lines * LINE + 2 * MARGIN for head in head_heights]
    top = MARGIN + (LINE + MARGIN if title else 0)

    page = Image.new("RGB", (page_width, top + sum(row_heights)), PAPER)
    pen = ImageDraw.Draw(page)
    tiles = []
    if title:
        text = shorten(make_drawable(title, load_font()), page_width - 2 * MARGIN)
        write_lines(pen, (MARGIN, MARGIN), [(text, INK)])
    for number, (row, head, head_height, row_height) in enumerate(
        zip(rows, heads, head_heights, row_heights, strict=True)
    ):
        write_lines(pen, (MARGIN, top), [(line, INK) for line in head])
        y = top + head_height
        for column, cell in enumerate(row):
            x = MARGIN + column * (width + MARGIN)
            image = Image.fromarray(np.asarray(cell.pixels, np.uint8))
            # NEAREST keeps the pixels of enlarged images as they are.
            page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if cell.frame:
                box = (x - FRAME, y - FRAME, x + width + FRAME - 1, y + height + FRAME - 1)
                pen.rectangle(box, outline=cell.frame, width=FRAME)
            write_lines(pen, (x, y + height + FRAME), cell.lines)
            box = (x, y, x + width, y + height)
            caption = cell.caption[:MAX_CAPTION]
            tiles.append(Tile(box, scale, number, caption, cell.passed, cell.rewards))
        top += row_height
    return Page(np.asarray(page), title, tiles)


def draw_samples(
    images: np.ndarray,
    prompts: Sequence[str],
    rewards: Sequence[Sequence[Rewards]] | None = None,
    title: str = "",
    frames: Sequence[Sequence[Color | None]] | None = None,
) -> Page:
    """Draws one row per prompt: the prompt, its samples, rewards below each.

    `images`: [rows, samples, H, W, 3] uint8. `rewards`: for each row and sample, name -> value;
    NaN is shown as n/a. `frames`: for each row and sample the color of its frame and rewards.
    """
    num_rows, samples = images.shape[:2]
    if len(prompts) != num_rows or (
        rewards is not None and [len(r) for r in rewards] != [samples] * num_rows
    ):
        raise ValueError(
            f"images {images.shape} need {num_rows} prompts and {num_rows}x{samples} rewards"
        )
    width = image_width(images[0, 0])
    rows = []
    for row in range(num_rows):
        colors = frames[row] if frames else [None] * samples
        cells = []
        for sample in range(samples):
            values = rewards[row][sample] if rewards else {}
            color = colors[sample]
            lines = [(line, color or FAINT) for line in format_rewards(values, width)]
            cells.append(
                Cell(images[row, sample], lines, color, caption=prompts[row], rewards=values)
            )
        rows.append(cells)
    page_width = samples * (width + MARGIN) - MARGIN
    return draw_page(rows, [wrap(prompt, page_width, max_lines=2) for prompt in prompts], title)


def draw_notes(rows: Sequence[tuple[np.ndarray, Sequence[tuple[str, Color]]]]) -> np.ndarray:
    """Draws one image [H, W, 3] per row, with lines of text on its right: [H', W', 3] uint8."""
    sizes = [_compute_displayed_size(pixels) for pixels, _ in rows]
    left = max(width for width, _ in sizes) + 2 * MARGIN
    heights = [
        max(height, len(lines) * LINE) for (_, height), (_, lines) in zip(sizes, rows, strict=True)
    ]
    height = MARGIN + sum(height + 2 * MARGIN for height in heights)
    page = Image.new("RGB", (left + TEXT_WIDTH + MARGIN, height), PAPER)
    pen, top = ImageDraw.Draw(page), MARGIN
    for (pixels, lines), size, row_height in zip(rows, sizes, heights, strict=True):
        image = Image.fromarray(np.asarray(pixels, np.uint8))
        page.paste(image.resize(size, Image.Resampling.NEAREST), (MARGIN, top))
        write_lines(pen, (left, top), lines)
        top += row_height + 2 * MARGIN
    return np.asarray(page)


def shrink(image: Image.Image | np.ndarray) -> np.ndarray:
    """Returns an image as [H, W, 3] uint8, at most CELL pixels wide and high."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    image = image.convert("RGB")
    image.thumbnail((CELL, CELL))
    return np.asarray(image)


def save_png(path: Path, pixels: np.ndarray, notes: str = "") -> Path:
    """Writes [H, W, 3] uint8 as a PNG with notes, whole or not at all. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngInfo()
    if notes:
        chunks.add_text(NOTES_KEY, notes, zip=True)
    with replace_file(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=chunks)
    return path


def read_page(path: Path) -> Page:
    """Reads the PNG file of a page; without tiles if it has no notes, or damaged ones.

    Raises:
        OSError: the file cannot be read, or is no image.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        notes = getattr(image, "text", {}).get(NOTES_KEY, "{}")
    try:
        values = json.loads(notes)
        tiles = [_read_tile(tile, pixels.shape) for tile in values.get("tiles", [])]
        return Page(pixels, str(values.get("title", "")), tiles)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Page(pixels, "", [])


def _read_tile(values: Mapping[str, Any], shape: tuple[int, ...]) -> Tile:
    """Reads a tile of a page of that shape [H, W, 3]. Raises: ValueError outside of the page."""
    left, top, right, bottom = map(int, values["box"])
    scale, passed = int(values["scale"]), values["passed"]
    if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0] and scale > 0):
        raise ValueError(f"found the box {values['box']}, expected one inside of {shape}")
    rewards = {str(k): math.nan if v is None else float(v) for k, v in values["rewards"].items()}
    return Tile(
        (left, top, right, bottom), scale, int(values["row"]), str(values["caption"]),
        None if passed is None else bool(passed), rewards,
    )  # fmt: skip


def format_answers_table(
    questions: Sequence[str],
    answers: Sequence[str],
    numbers: Sequence[Mapping[str, float]],
    solutions: Sequence[str] | None = None,
    width: int = 300,
    heads: tuple[str, str] = ("question", "answer"),
) -> str:
    """Returns a markdown table with a row per answer; its numbers share a column.

    Texts are cut to `width` characters, and escaped so that they cannot break the table.
    """
    columns = {heads[0]: [escape_cell(text, width) for text in questions]}
    if solutions is not None:
        columns["solution"] = [escape_cell(text, width) for text in solutions]
    columns[heads[1]] = [escape_cell(text, width) for text in answers]
    # TensorBoard breaks the names of narrow columns within words.
    texts = ["\n".join(f"{n} {_format_number(x)}" for n, x in row.items()) for row in numbers]
    columns["numbers"] = [escape_cell(text, width) for text in texts]
    lines = [
        "| " + " | ".join(escape_cell(name, width) for name in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def escape_cell(text: str, width: int) -> str:
    """Returns a text as one markdown cell: cut, with pipes, tags and line ends escaped."""
    text = text if len(text) <= width else text[: width - 1] + "…"
    # The backslash comes first, so that the ones added here are not escaped again.
    for char in "\\`*_[]|":
        text = text.replace(char, "\\" + char)
    # `<think>` would be read as HTML and not shown.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(text.splitlines())


def format_rewards(rewards: Rewards, width: int) -> list[str]:
    """Returns `name value` of each reward, the name shortened to fit into `width` pixels."""
    lines = []
    for name, value in rewards.items():
        number = " " + _format_number(value)
        room = width - load_font().getlength(number)
        lines.append(shorten(make_drawable(name, load_font()), room) + number)
    return lines


def _format_number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3g}"


# ---- text and sizes on a page


def image_width(pixels: np.ndarray) -> int:
    """Returns the width of an image [H, W, 3] on a page, in pixels."""
    return _compute_displayed_size(pixels)[0]


def _compute_displayed_size(pixels: np.ndarray) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    # CELL = 128: 48 pixels -> 3 times, 144 pixels; 384 pixels stay.
    scale = max(1, math.ceil(CELL / width))
    return width * scale, height * scale


@functools.cache
def load_font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Returns the font of all pages."""
    return ImageFont.load_default(FONT_SIZE)


def shorten(text: str, width: float) -> str:
    """Returns the text, cut so that it fits into `width` pixels."""
    font = load_font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Returns the text in at most `max_lines` lines that fit into `width` pixels."""
    text = " ".join(make_drawable(text, load_font()).split())
    # textwrap counts characters. The width of "n" stands for all; `shorten` cuts what is too long.
    characters = max(1, int(width / max(load_font().getlength("n"), 1)))
    lines = textwrap.wrap(text, characters) or [""]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return [shorten(line, width) for line in lines]


def write_lines(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], lines: Sequence[tuple[str, Color]]
) -> None:
    """Writes lines of (text, color) from a top left corner on."""
    x, y = corner
    for index, (line, color) in enumerate(lines):
        pen.text((x, y + index * LINE), line, color, load_font())
