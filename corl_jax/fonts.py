"""Replaces characters that a font lacks, because Pillow draws them as boxes."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
PUNCTUATION = str.maketrans("‚„–—−", "'\"---")
MISSING = "\uffff"  # of no font
BITMAP_CHARACTERS = 256  # of Pillow's font without FreeType, which knows Latin-1


def make_drawable(text: str, font: Font) -> str:
    """Returns a text in characters that the font has.

    An accented letter loses its accent. Characters of other scripts become Python escapes.
    In: "Bäume, 木"  Out: "Baume, \\u6728"
    """
    # NFC first: "a" and a combining mark become one character, which the font may have.
    composed = unicodedata.normalize("NFC", text)
    return "".join(_replace_character(character, font) for character in composed)


@functools.lru_cache(maxsize=4096)
def _replace_character(character: str, font: Font) -> str:
    if character.isspace():
        return " "
    if _has_glyph(character, font):
        return character
    plain = unicodedata.normalize("NFKD", character.translate(PUNCTUATION))
    base = "".join(part for part in plain if not unicodedata.combining(part))
    if base and all(_has_glyph(part, font) for part in base):
        return base
    return character.encode("unicode_escape").decode("ascii")


def _has_glyph(character: str, font: Font) -> bool:
    if not isinstance(font, ImageFont.FreeTypeFont):
        return ord(character) < BITMAP_CHARACTERS and character.isprintable()
    if "\ud800" <= character <= "\udfff":  # half a pair, which cannot be drawn
        return False
    # Pillow has no test for a glyph. A character without one is drawn as the font's box.
    drawn, box = font.getmask(character), font.getmask(MISSING)
    return drawn.size != box.size or _read_pixels(drawn) != _read_pixels(box)


def _read_pixels(mask: Any) -> bytes:  # of a type that Pillow keeps to itself
    return bytes(mask)
