"""Cuts the image pages of a run into images, and pairs those of the same prompt over steps."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from corl_jax.report.charts import thin_out
from corl_jax.runs.pictures import HELD_OUT, Page, Tile, read_page

FIXED = "step"
"""Files `step_STEP.png` show images of the same prompts with their rewards."""
MAX_STEPS, MAX_CARDS = 13, 24
MAX_SIDE, MAX_PAGE_WIDTH = 256, 1000  # pixels; larger images are made smaller
PNG_SIDE = 96  # images up to this size are kept without loss
JPEG_QUALITY = 85


@dataclasses.dataclass(frozen=True)
class Shot:
    """An image of a prompt at a step."""

    uri: str  # data URI
    passed: bool | None
    rewards: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Card:
    """The images of a prompt, several for each step."""

    prompt: str
    shots: list[list[Shot]]  # by step


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of the same prompts over steps."""

    steps: list[int]
    titles: list[str]  # of the pages
    cards: list[Card]
    pages: list[str]  # data URIs of whole pages by step, where they cannot be cut

    def describe_step(self, at: int) -> str:
        """Returns the title of a page, and how many of the shown images match their prompt."""
        verdicts = [shot.passed for card in self.cards for shot in card.shots[at]]
        title = self.titles[at] or f"step {self.steps[at]}"
        return f"{title} ({sum(map(bool, verdicts))} of the {len(verdicts)} shown here)"


def read_galleries(
    images: Path, notes: list[str], max_cards: int = MAX_CARDS
) -> dict[str, Gallery]:
    """Returns the galleries of a run by kind of file; names damaged files in `notes`."""
    galleries = {}
    for kind, files in list_pages(images).items():
        steps, pages = [], []
        for step, path in thin_out(files, MAX_STEPS):
            try:
                pages.append(read_page(path))
                steps.append(step)
            # Pillow raises errors of several types for damaged files.
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                notes.append(f"images/{path.name} could not be read ({type(error).__name__}).")
        if pages:
            galleries[kind] = make_gallery(steps, pages, max_cards)
    return galleries


def list_pages(images: Path) -> dict[str, list[tuple[int, Path]]]:
    """Returns kind of page -> (step, file) in order of steps."""
    pages: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(images.glob("*.png")):
        if parts := re.fullmatch(rf"({HELD_OUT}|{FIXED})_(\d+)(_\w+)?", path.stem):
            kind = parts[1] + (parts[3] or "")
            pages.setdefault(kind, []).append((int(parts[2]), path))
    return {kind: sorted(files) for kind, files in sorted(pages.items())}


def make_gallery(steps: list[int], pages: Sequence[Page], max_cards: int) -> Gallery:
    """Pairs the images of pages by prompt; shows whole pages if they have not the same prompts."""
    rows = [_group_rows(page) for page in pages]
    prompts = [[tiles[0].caption for tiles in page] for page in rows]
    titles = [page.title for page in pages]
    if not rows[0] or any(of_page != prompts[0] for of_page in prompts):
        whole = [encode_image(page.pixels, MAX_PAGE_WIDTH) for page in pages]
        return Gallery(steps, titles, [], whole)
    cards = []
    for at, prompt in enumerate(prompts[0][:max_cards]):
        shots = [
            [make_shot(page, tile) for tile in of_page[at]]
            for page, of_page in zip(pages, rows, strict=True)
        ]
        cards.append(Card(prompt, shots))
    return Gallery(steps, titles, cards, [])


def _group_rows(page: Page) -> list[list[Tile]]:
    """Returns the tiles of each prompt: a row of images with rewards, or one with a verdict."""
    if any(tile.passed is not None for tile in page.tiles):
        return [[tile] for tile in page.tiles]
    rows: dict[int, list[Tile]] = {}
    for tile in page.tiles:
        rows.setdefault(tile.row, []).append(tile)
    return list(rows.values())


def make_shot(page: Page, tile: Tile) -> Shot:
    """Cuts an image out of a page."""
    return Shot(encode_image(cut_tile(page, tile), MAX_SIDE), tile.passed, tile.rewards)


def cut_tile(page: Page, tile: Tile) -> np.ndarray:
    """Returns an image of a page at its own size, [H, W, 3] uint8."""
    left, top, right, bottom = tile.box
    return page.pixels[top : bottom : tile.scale, left : right : tile.scale]


def encode_image(pixels: np.ndarray, max_width: int) -> str:
    """Returns an image [H, W, 3] uint8 as a data URI: small ones as PNG, others as JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.width > max_width:
        size = (max_width, max(1, round(image.height * max_width / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    kind = "png" if max(image.size) <= PNG_SIDE else "jpeg"
    image.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": JPEG_QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
