"""Finds and decodes the images of a TSV's rows, as VLMEvalKit does."""

from __future__ import annotations

import ast
import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from corl_jax.data.images import FORMATS, decode_image
from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.tsv.table import IMAGE, IMAGE_PATH, Table

MAX_REFERENCE_LENGTH = 64
"""The longest text in column `image` that is the index of another row."""
THREADS = 8

Source = str | Path
"""The base64 of an image file, or its path."""


def find_images(table: Table) -> list[tuple[Source, ...]]:
    """Returns the images of each row, in order.

    Raises:
        InputError: listing rows with a broken list, a reference to no row, or a missing file.
    """
    problems, images = Problems(), []
    texts = _resolve_references(table, problems) if IMAGE in table.columns else None
    for number, row in enumerate(table.rows):
        with problems.collect(f"{table.where(number)}: "):
            if texts is not None:
                images.append(tuple(split_list(texts[number], IMAGE)))
            else:
                paths = split_list(str(row[IMAGE_PATH]), IMAGE_PATH)
                images.append(tuple(_find_file(path, table.path.parent) for path in paths))
    problems.raise_any()
    return images


def split_list(text: str, column: str) -> list[str]:
    """Returns the elements of a Python list in a text; other texts are their only element."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{column} is no list ({type(error).__name__}); expected ['..', ..]"
        ) from error
    if not values:
        raise InputError(f"{column} is an empty list; expected at least one image")
    return [str(value) for value in values]


def check_images(table: Table, images: Sequence[Sequence[Source]]) -> None:
    """Decodes every image once. Raises: InputError listing the rows with a broken one."""
    problems = Problems()
    # Rows share images: each is decoded once, and named by its first row.
    first_rows: dict[Source, int] = {}
    for number, sources in enumerate(images):
        for source in sources:
            first_rows.setdefault(source, number)

    def find_problems(source: Source, number: int) -> list[str]:
        try:
            decode_image(read_file(source))
        except InputError as error:
            return [f"{table.where(number)}: {problem}" for problem in error.problems]
        return []

    with ThreadPoolExecutor(THREADS) as pool:
        for lines in pool.map(find_problems, first_rows, first_rows.values()):
            problems.add(lines)
    problems.raise_any()


def open_image(source: Source) -> Image.Image:
    """Decodes an image to RGB; drops transparency and applies no rotation, as VLMEvalKit."""
    image = Image.open(io.BytesIO(read_file(source)), formats=FORMATS)
    return image.convert("RGB")


def read_file(source: Source) -> bytes:
    """Returns the bytes of an image file. Raises: InputError if they cannot be had."""
    if isinstance(source, Path):
        try:
            return source.read_bytes()
        except OSError as error:
            raise InputError(f"image: {source}: cannot be read ({error.strerror})") from error
    if source.startswith("data:"):
        raise InputError("image begins with 'data:'; expected base64 without this prefix")
    try:
        return base64.b64decode(source)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"image is broken base64 ({error}; {len(source):,} characters); write the row "
            "again, or remove it"
        ) from error


def _resolve_references(table: Table, problems: Problems) -> list[str]:
    """Returns the text of each row's image; a short text is replaced by the row's that it names."""
    texts = {str(row["index"]): str(row[IMAGE]) for row in table.rows}
    for number, row in enumerate(table.rows):
        index = str(row["index"])
        text = texts[index]
        if len(text) > MAX_REFERENCE_LENGTH:
            continue
        target = texts.get(text, "")
        if len(target) > MAX_REFERENCE_LENGTH:
            texts[index] = target
        else:
            reason = "is a reference itself" if target else "does not exist"
            problems.add(
                f"{table.where(number)}: image is {text!r}, a reference to a row that {reason}; "
                "expected base64, or the index of a row with it"
            )
    return list(texts.values())


def _find_file(text: str, folder: Path) -> Path:
    """Returns the file of a path that is absolute, or relative to the table or to this folder."""
    places: Mapping[Path, Any] = dict.fromkeys([folder / text, Path(text)])
    for place in places:
        if place.is_file():
            return place
    shown = " or ".join(str(place) for place in places)
    raise InputError(f"image_path: found no file {shown}; copy the data set's images there")
