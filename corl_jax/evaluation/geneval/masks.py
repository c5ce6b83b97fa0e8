"""Reads masks of objects: COCO's run lengths, as lists or compressed texts, and PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.errors import InputError, take_first_line

EXPECTED = 'expected {"size": [height, width], "counts": [..] or a text} or the path of a PNG'


def decode_mask(value: Any, folder: Path) -> np.ndarray:
    """Returns a mask, bool [H, W]. A path is relative to `folder`; there, 0 is outside.

    Raises: InputError for a mask that cannot be read.
    """
    if isinstance(value, str):
        try:
            with Image.open(folder / value) as image:
                return np.asarray(image.convert("L")) > 0
        except OSError as error:
            reason = take_first_line(error)
            raise InputError(f"mask {value}: cannot be read ({reason}); {EXPECTED}") from None
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise InputError(f"mask: found {str(value)[:60]}; {EXPECTED}")
    size, counts = value["size"], value["counts"]
    if not (_are_integers(size) and len(size) == 2 and min(size) > 0):
        raise InputError(f"mask: size is {size}; expected [height, width]")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not _are_integers(counts) or min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise InputError(
            f"mask: its counts are not run lengths of {size[0]} x {size[1]} pixels; {EXPECTED}"
        )
    # Runs of outside and inside take turns, column by column: [2, 1] of [3, 1] -> 0 0 1.
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[1], size[0]).T


def decode_counts(text: str) -> list[int]:
    """Returns the run lengths of COCO's compressed text. Raises: InputError for another text.

    A character holds five bits of a number, lowest first, and whether more follow. From the fourth
    number on, each is the difference from the number two before.
    """
    counts: list[int] = []
    number, bits = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise InputError(f"mask: counts hold {character!r}, which no compressed text has")
        number |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:  # the sign bit of the last character
            number -= 1 << bits
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number, bits = 0, 0
    if bits:
        raise InputError("mask: its counts end in the middle of a number; write the file again")
    return counts


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    )
