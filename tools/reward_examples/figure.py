"""The figure: the pictures, and below each its scores as numbers with bars."""

from __future__ import annotations

import functools
import io
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from corl_jax.atomic_files import replace_file
from corl_jax.fonts import make_drawable
from tools.reward_examples import cases
from tools.reward_examples.scoring import T2I, Example, Found

LABEL, CELL, PICTURE = 330, 138, 128  # widths in pixels
ROW, BAR, MARGIN, FONT_SIZE = 36, 5, 8, 13
LINE = FONT_SIZE + 3
CAPTION_LINES, CAPTION_LETTERS = 3, 20
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
TRACK, FILL = (228, 228, 228), (70, 110, 180)
SCORES_KEY = "scores"  # of the PNG's text: what the figure shows, so that it can be checked


def save(path: Path, found: Found) -> None:
    """Writes the figure as a PNG that also holds its scores as text."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text(SCORES_KEY, json.dumps(np.round(found.t2i.astype(float), 4).tolist()))
    buffer = io.BytesIO()
    draw(found).quantize(128).save(buffer, format="PNG", pnginfo=notes, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(buffer.getvalue())


def scores_of(path: Path) -> np.ndarray:
    """What a figure shows, [T2I, drawings]."""
    with Image.open(path) as image:
        return np.array(json.loads(image.info[SCORES_KEY]), float)


def draw(found: Found) -> Image.Image:
    """A column per drawing, a row per reward."""
    rows = cases.read(cases.DRAWINGS)
    captions = next(iter(found.said.values()))
    top = MARGIN + LINE + PICTURE + CAPTION_LINES * LINE + MARGIN
    size = (2 * MARGIN + LABEL + CELL * len(rows), top + ROW * len(T2I) + MARGIN)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    _write(pen, (MARGIN, MARGIN), "prompt:", FAINT)
    for number, line in enumerate(textwrap.wrap(rows[0]["prompt"], 36), start=1):
        _write(pen, (MARGIN, MARGIN + number * LINE), line, INK)
    _write(pen, (MARGIN, MARGIN + LINE + PICTURE), "the mini Janus's caption:", FAINT)
    for column, (case, caption) in enumerate(zip(rows, captions, strict=True)):
        x, y = MARGIN + LABEL + column * CELL, MARGIN
        _write(pen, (x, y), case["shows"], INK)
        picture = cases.picture(case).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        page.paste(picture, (x, y + LINE))
        for number, line in enumerate(_lines(caption)):
            _write(pen, (x, y + LINE + PICTURE + number * LINE), line, FAINT)
    for row, (example, values) in enumerate(zip(T2I, found.t2i, strict=True)):
        _row(pen, top + row * ROW, example, values)
    return page


def _row(pen: ImageDraw.ImageDraw, y: int, example: Example, values: np.ndarray) -> None:
    pen.line((MARGIN, y - 3, MARGIN + LABEL + CELL * len(values) - MARGIN, y - 3), TRACK)
    _write(pen, (MARGIN, y), example.reward, INK)
    bounds = f"{example.low:g} to {example.high:g}"
    _write(pen, (MARGIN + LABEL - 12 - _font().getlength(bounds), y), bounds, FAINT)
    _write(pen, (MARGIN, y + LINE), example.settings, FAINT)
    for column, value in enumerate(values):
        x, width = MARGIN + LABEL + column * CELL, PICTURE - 1
        share = np.clip((value - example.low) / (example.high - example.low), 0.0, 1.0)
        _write(pen, (x, y), f"{value:.3f}", INK)
        pen.rectangle((x, y + LINE + 3, x + width, y + LINE + 3 + BAR), TRACK)
        if share > 0:
            pen.rectangle((x, y + LINE + 3, x + share * width, y + LINE + 3 + BAR), FILL)


def _lines(caption: str) -> list[str]:
    return textwrap.wrap(caption, CAPTION_LETTERS, max_lines=CAPTION_LINES, placeholder=" …")


def _write(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, ink: tuple) -> None:
    pen.text(corner, make_drawable(text, _font()), ink, _font())


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)
