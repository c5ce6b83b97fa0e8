"""Draws a page of judged images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corl_jax.runs import pictures

PROMPT_LINES = 3  # below an image
PASS, FAIL = ("pass", pictures.GOOD), ("fail", pictures.BAD)


def draw_verdicts(
    images: np.ndarray, prompts: Sequence[str], passed: Sequence[bool], title: str,
    max_images: int, columns: int,
) -> pictures.Page:  # fmt: skip
    """Returns a page of the first images [N, S, S, 3], with verdict and prompt below each.

    A frame is green for an image that passed, else red.
    """
    cells = []
    for pixels, prompt, has_passed in zip(images, prompts, passed, strict=True):
        verdict, color = PASS if has_passed else FAIL
        width = pictures.image_width(pixels)
        lines = [(line, pictures.INK) for line in pictures.wrap(prompt, width, PROMPT_LINES)]
        lines = [(verdict, color), *lines]
        cells.append(
            pictures.Cell(pixels, lines, frame=color, caption=prompt, passed=bool(has_passed))
        )
    cells = cells[:max_images]
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    return pictures.draw_page(rows, title=title)
