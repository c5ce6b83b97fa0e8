"""Pictures and tables of samples with their rewards, for TensorBoard, files and the README."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corl_jax.atomic_files import replace_file
from corl_jax.fonts import make_drawable

CELL = 128  # pixels; smaller images are enlarged by a whole factor, so that text fits below
FONT_SIZE = 12
MARGIN = 6
HELD_OUT = "held_out"
"""Files `held_out_STEP.png` show drawings of an evaluation."""
_LINE = FONT_SIZE + 3
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)

Rewards = Mapping[str, float]


def grid(
    images: np.ndarray,
    prompts: Sequence[str],
    rewards: Sequence[Sequence[Rewards]] | None = None,
    title: str = "",
) -> np.ndarray:
    """One row per prompt, the prompt above its samples, rewards below each: [H', W', 3] uint8.

    `images`: [rows, samples, H, W, 3] uint8. `rewards`: for each row and sample, name -> value;
    NaN is shown as n/a.
    """
    rows, samples, height, width, _ = images.shape
    if len(prompts) != rows or (
        rewards is not None and [len(r) for r in rewards] != [samples] * rows
    ):
        raise ValueError(f"images {images.shape} need {rows} prompts and {rows}x{samples} rewards")
    scale = max(1, math.ceil(CELL / width))
    cell_width, cell_height = width * scale, height * scale
    page_width = MARGIN + samples * (cell_width + MARGIN)
    captions = [
        [reward_lines(cell, cell_width) for cell in row]
        for row in (rewards if rewards is not None else [[{}] * samples] * rows)
    ]
    heads = [_wrapped(prompt, page_width - 2 * MARGIN, lines=2) for prompt in prompts]
    below = _LINE * max((len(lines) for row in captions for lines in row), default=0)
    heights = [len(head) * _LINE + cell_height + below + 2 * MARGIN for head in heads]
    top = MARGIN + (_LINE + MARGIN if title else 0)

    page = Image.new("RGB", (page_width, top + sum(heights)), _PAPER)
    draw, font = ImageDraw.Draw(page), _font()
    if title:
        draw.text(
            (MARGIN, MARGIN),
            _fitted(make_drawable(title, font), page_width - 2 * MARGIN),
            _INK,
            font,
        )
    for row, (head, row_height) in enumerate(zip(heads, heights, strict=True)):
        _write(draw, (MARGIN, top), head, _INK)
        y = top + len(head) * _LINE
        for column in range(samples):
            x = MARGIN + column * (cell_width + MARGIN)
            picture = Image.fromarray(np.asarray(images[row, column], np.uint8))
            picture = picture.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            page.paste(picture, (x, y))
            _write(draw, (x, y + cell_height + 2), captions[row][column], _FAINT)
        top += row_height
    return np.asarray(page)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures beside each other on white, tops level: e.g. grids before and after."""
    height = max(left.shape[0], right.shape[0])
    padded = [
        np.pad(page, ((0, height - page.shape[0]), (0, 0), (0, 0)), constant_values=255)
        for page in (left, right)
    ]
    rule = np.full((height, 2, 3), _FAINT[0], np.uint8)
    return np.concatenate([padded[0], rule, padded[1]], axis=1)


def save_png(path: Path, pixels: np.ndarray) -> Path:
    """Writes [H, W, 3] uint8 as a PNG, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
    return path


def answers_table(
    questions: Sequence[str],
    answers: Sequence[str],
    rewards: Sequence[Rewards],
    solutions: Sequence[str] | None = None,
    width: int = 300,
) -> str:
    """A markdown table with a row per answer and a column per reward.

    Texts are cut to `width` characters; nothing in them can break the table.
    """
    names = list(dict.fromkeys(name for row in rewards for name in row))
    columns = {"question": [cell_text(text, width) for text in questions]}
    columns["answer"] = [cell_text(text, width) for text in answers]
    if solutions is not None:
        columns["solution"] = [cell_text(text, width) for text in solutions]
    for name in names:
        columns[name] = [_number(row.get(name, math.nan)) for row in rewards]
    lines = [
        "| " + " | ".join(cell_text(name, width) for name in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def cell_text(text: str, width: int) -> str:
    """A text as one markdown cell: cut, with pipes, tags and line ends made harmless.

    Tags matter: `<think>` would be read as HTML and not shown.
    """
    text = text if len(text) <= width else text[: width - 1] + "…"
    for char in "\\`*_[]|":
        text = text.replace(char, "\\" + char)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(text.splitlines())


def reward_lines(rewards: Rewards, width: int) -> list[str]:
    """`name value` of each reward, the name shortened to what fits into `width` pixels."""
    lines = []
    for name, value in rewards.items():
        number = " " + _number(value)
        room = width - _font().getlength(number)
        lines.append(_fitted(make_drawable(name, _font()), room) + number)
    return lines


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3g}"


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)


def _fitted(text: str, width: float) -> str:
    font = _font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """At most `lines` lines that fit into `width` pixels."""
    text = " ".join(make_drawable(text, _font()).split())
    characters = max(1, int(width / max(_font().getlength("n"), 1)))
    pieces = textwrap.wrap(text, characters) or [""]
    if len(pieces) > lines:
        pieces = [*pieces[: lines - 1], " ".join(pieces[lines - 1 :])]
    return [_fitted(piece, width) for piece in pieces]


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: list[str], ink: tuple
) -> None:
    x, y = corner
    for index, line in enumerate(lines):
        draw.text((x, y + index * _LINE), line, ink, _font())
