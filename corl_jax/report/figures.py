"""Writes figures of a report as files: images before and after, and the main curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corl_jax.atomic_files import replace_file
from corl_jax.errors import InputError
from corl_jax.fonts import make_drawable
from corl_jax.report import curves
from corl_jax.report.charts import tile_charts
from corl_jax.report.gallery import cut_tile, list_pages
from corl_jax.report.read import RunRecord
from corl_jax.runs.pictures import (
    FAINT,
    HELD_OUT,
    INK,
    PAPER,
    Page,
    Tile,
    read_page,
    save_png,
)

BEFORE_AFTER, CURVES = "before_after.png", "curves.svg"
SIDE_ROWS, SIDE_COLUMNS = 2, 4  # images of each half
# Drawn at twice the size of a README's column, 880 pixels, for screens with small pixels.
CELL, GAP, MARK, FRAME = 190, 20, 44, 7
TITLE_SIZE, TEXT_SIZE, LINE = 30, 24, 30
CAPTION_LINES, MAX_CAPTION = 4, 200  # characters
PASSED, FAILED = (20, 120, 58), (179, 38, 30)
CURVES_SHOWN, CURVE_COLUMNS = 4, 2


def write_figures(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes the figures and returns their files.

    Raises:
        InputError: the first run has no evaluation that generated images, or no curves.
        OSError: a file cannot be written.
    """
    picture = draw_before_after(records[0].root)
    curves_text = draw_curves(records)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CURVES
    with replace_file(path) as file:
        file.write(curves_text.encode())
    return [save_png(folder / BEFORE_AFTER, picture), path]


# ---- images before and after


def draw_before_after(run: Path) -> np.ndarray:
    """Draws the same prompts at the first and the last evaluation: [H, W, 3] uint8.

    Raises:
        InputError: the run has not two evaluations that generated the same prompts.
    """
    images = run / "images"
    files = list_pages(images).get(HELD_OUT, [])
    if len(files) < 2:
        raise InputError(
            f"{images}: found {len(files)} file(s) {HELD_OUT}_STEP.png, expected two or more; they "
            "are made by the evaluations of a run that generate images"
        )
    pages = [(step, _read_page(path)) for step, path in (files[0], files[-1])]
    captions = [[tile.caption for tile in page.tiles] for _, page in pages]
    if not captions[0] or captions[0] != captions[1]:
        raise InputError(
            f"{images}: {files[0][1].name} and {files[-1][1].name} do not say where the images of "
            "the same prompts are; they were written by an older version, so train again"
        )
    chosen = choose_tiles(*(page.tiles for _, page in pages))
    halves = [
        draw_half(page, chosen, f"{word} (step {step})")
        for word, (step, page) in zip(("Before", "After"), pages, strict=True)
    ]
    height = max(half.height for half in halves)
    figure = Image.new("RGB", (sum(half.width for half in halves) + 2 * GAP, height), PAPER)
    figure.paste(halves[0], (0, 0))
    middle = halves[0].width + GAP
    ImageDraw.Draw(figure).line((middle, GAP, middle, height - GAP), (210, 215, 222), 2)
    figure.paste(halves[1], (halves[0].width + 2 * GAP, 0))
    return np.asarray(figure)


def _read_page(path: Path) -> Page:
    try:
        return read_page(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: unreadable ({error}); expected a PNG file of the run") from None


def choose_tiles(before: Sequence[Tile], after: Sequence[Tile]) -> list[int]:
    """Returns numbers of images with different prompts, in their order.

    As large a part of them as of all images became right, became wrong, stayed right and stayed
    wrong. Of each of these four kinds they are the first ones.
    """
    firsts = {tile.caption: number for number, tile in reversed([*enumerate(before)])}
    kinds: dict[tuple[bool | None, bool | None], list[int]] = {}
    for number in sorted(firsts.values()):
        kinds.setdefault((before[number].passed, after[number].passed), []).append(number)
    seats = min(SIDE_ROWS * SIDE_COLUMNS, len(firsts))
    # 8 seats, parts of 3.6, 2.7, 1.3 and 0.4: 3 + 2 + 1 + 0, and the last two by the largest rests.
    parts = {kind: seats * len(numbers) / len(firsts) for kind, numbers in kinds.items()}
    counts = {kind: int(part) for kind, part in parts.items()}
    by_rest = sorted(kinds, key=lambda kind: counts[kind] - parts[kind])
    for kind in by_rest[: seats - sum(counts.values())]:
        counts[kind] += 1
    return sorted(number for kind in kinds for number in kinds[kind][: counts[kind]])


def draw_half(page: Page, chosen: Sequence[int], title: str) -> Image.Image:
    """Draws some images of a page with marks and prompts, below a title with the page's rate."""
    text_font, title_font = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TITLE_SIZE)
    captions = [wrap_caption(page.tiles[at].caption, text_font) for at in chosen]
    width = GAP + SIDE_COLUMNS * (CELL + GAP)
    row_height = CELL + FRAME + max(map(len, captions)) * LINE + GAP
    top = 2 * LINE + 2 * GAP
    num_rows = -(-len(chosen) // SIDE_COLUMNS)
    half = Image.new("RGB", (width, top + num_rows * row_height), PAPER)
    pen = ImageDraw.Draw(half)
    pen.text((GAP, GAP // 2), title, INK, title_font)
    # "step 60: 64.3% of 512 images match their prompt" -> without the step
    rate = re.sub(r"^step \d+:? ?", "", page.title)
    pen.text((GAP, GAP // 2 + LINE + 8), rate, FAINT, text_font)
    for place, at in enumerate(chosen):
        row, column = divmod(place, SIDE_COLUMNS)
        x, y = GAP + column * (CELL + GAP), top + row * row_height
        draw_tile(half, page, page.tiles[at], (x, y))
        for number, line in enumerate(captions[place]):
            pen.text((x, y + CELL + FRAME + 2 + number * LINE), line, INK, text_font)
    return half


def draw_tile(figure: Image.Image, page: Page, tile: Tile, corner: tuple[int, int]) -> None:
    """Draws an image with a frame and a mark, which also tells by its form whether it matches."""
    x, y = corner
    image = Image.fromarray(np.ascontiguousarray(cut_tile(page, tile)))
    # Small images are enlarged without inventing pixels between theirs.
    method = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
    figure.paste(image.resize((CELL, CELL), method), corner)
    if tile.passed is None:
        return
    pen, color = ImageDraw.Draw(figure), PASSED if tile.passed else FAILED
    pen.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=color, width=FRAME)
    left, top = x + CELL - MARK + 8, y - 8
    pen.ellipse((left, top, left + MARK, top + MARK), fill=color, outline=PAPER, width=2)

    def draw_stroke(*points: tuple[float, float]) -> None:
        # In parts of the circle's width, so that the mark can have any size.
        places = [(left + MARK * a, top + MARK * b) for a, b in points]
        pen.line(places, PAPER, 5, joint="curve")

    if tile.passed:
        draw_stroke((0.27, 0.52), (0.44, 0.68), (0.74, 0.33))
    else:
        draw_stroke((0.33, 0.33), (0.67, 0.67))
        draw_stroke((0.67, 0.33), (0.33, 0.67))


def wrap_caption(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Returns a prompt in lines that fit below an image; ends with … if it is too long."""
    # Cut first, because long prompts would be measured a character at a time.
    words = " ".join(make_drawable(text[:MAX_CAPTION], font).split()).split(" ")
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], " ".join(lines[CAPTION_LINES - 1 :])]
    return [shorten_line(line, font) for line in lines]


def shorten_line(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Returns a line, cut so that it fits below an image."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "…") > CELL:
        text = text[:-1]
    return text + "…"


# ---- curves


def draw_curves(records: Sequence[RunRecord]) -> str:
    """Draws the headline of the evaluations and the rewards as one SVG file.

    Raises:
        InputError: the log has nothing to draw.
    """
    charts = [*curves.draw_evaluations(records, True), *curves.draw_training(records)]
    charts = charts[:CURVES_SHOWN]
    if not charts:
        raise InputError(
            f"{records[0].root / 'metrics.jsonl'}: found no evaluation and no step; expected the "
            "log of a training"
        )
    return tile_charts(charts, CURVE_COLUMNS)
