"""Draws the figure: the images, and below each its scores as numbers with bars."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from corl_jax.atomic_files import replace_file
from corl_jax.runs import pictures
from corl_jax.runs.pictures import CELL, FAINT, INK, LINE, MARGIN
from tools.reward_examples import cases
from tools.reward_examples.scoring import T2I, Example, Scores

LABEL, ROW, BAR = 330, 36, 5  # width of the labels, heights of a reward and of a bar, pixels
CAPTION_LINES = 3
TRACK, FILL = (228, 228, 228), (70, 110, 180)
SCORES_KEY = "scores"  # of the PNG's text: what the figure shows, so that it can be checked


def save(path: Path, scores: Scores) -> None:
    """Writes the figure as a PNG that also holds its scores as text."""
    # The scores travel in the file, so that `--check` compares numbers and not pixels, which change
    # with the font.
    notes = PngImagePlugin.PngInfo()
    notes.add_text(SCORES_KEY, json.dumps(np.round(scores.t2i.astype(float), 4).tolist()))
    buffer = io.BytesIO()
    draw(scores).quantize(128).save(buffer, format="PNG", pnginfo=notes, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(buffer.getvalue())


def read_scores(path: Path) -> np.ndarray:
    """Returns the scores that a figure shows, [T2I, images]."""
    with Image.open(path) as image:
        return np.array(json.loads(image.info[SCORES_KEY]), float)


def draw(scores: Scores) -> Image.Image:
    """Draws a column per image, a row per reward."""
    rows = cases.load_cases(cases.DRAWINGS)
    captions = next(iter(scores.answers.values()))
    images = Image.fromarray(pictures.draw_page([_make_cells(rows, captions)]).pixels)
    size = (LABEL + images.width, images.height + ROW * len(T2I) + MARGIN)
    page = Image.new("RGB", size, pictures.PAPER)
    page.paste(images, (LABEL, 0))
    pen = ImageDraw.Draw(page)
    prompt = pictures.wrap(rows[0]["prompt"], LABEL - 2 * MARGIN, max_lines=4)
    prompt = [("prompt:", FAINT), *((line, INK) for line in prompt)]
    pictures.write_lines(pen, (MARGIN, MARGIN), prompt)
    caption = ("the mini Janus's caption:", FAINT)
    pictures.write_lines(pen, (MARGIN, MARGIN + CELL + pictures.FRAME + LINE), [caption])
    for row, (example, values) in enumerate(zip(T2I, scores.t2i, strict=True)):
        _draw_scores(pen, images.height + row * ROW, example, values)
    return page


def _make_cells(rows: list[dict], captions: list[str]) -> list[pictures.Cell]:
    """Returns each image with what it shows and the mini Janus's caption."""
    cells = []
    for case, caption in zip(rows, captions, strict=True):
        lines = [(line, FAINT) for line in pictures.wrap(caption, CELL, CAPTION_LINES)]
        pixels = np.asarray(cases.open_image(case))
        cells.append(pictures.Cell(pixels, [(case["shows"], INK), *lines]))
    return cells


def _draw_scores(pen: ImageDraw.ImageDraw, y: int, example: Example, values: np.ndarray) -> None:
    """Draws a reward's name, range and options, and the score of each image with a bar."""
    right = LABEL + len(values) * (CELL + MARGIN)
    pen.line((MARGIN, y - 3, right, y - 3), TRACK)
    bounds = f"{example.low:g} to {example.high:g}"
    place = LABEL - 12 - pictures.load_font().getlength(bounds)
    pictures.write_lines(pen, (MARGIN, y), [(example.reward, INK), (example.settings, FAINT)])
    pictures.write_lines(pen, (place, y), [(bounds, FAINT)])
    for column, value in enumerate(values):
        x, width = LABEL + MARGIN + column * (CELL + MARGIN), CELL - 1
        share = np.clip((value - example.low) / (example.high - example.low), 0.0, 1.0)
        pictures.write_lines(pen, (x, y), [(f"{value:.3f}", INK)])
        pen.rectangle((x, y + LINE + 3, x + width, y + LINE + 3 + BAR), TRACK)
        if share > 0:
            pen.rectangle((x, y + LINE + 3, x + share * width, y + LINE + 3 + BAR), FILL)
