"""Reads folders of images as GenEval's script does: NUMBER/metadata.jsonl, NUMBER/samples/*.png."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from corl_jax.errors import InputError, Problems, take_first_line

Metadata = TypeVar("Metadata")
# As GenEval's script matches names: not anchored at the end, so it would read 0000.png.tmp too.
SAMPLE_NAME = re.compile(r"\d+\.png")


def list_images(
    folder: Path, read_metadata: Callable[[Path], Metadata], option: str = "--images"
) -> list[tuple[Path, Metadata]]:
    """Returns the images that GenEval's script would read, in order, each with its metadata.

    `read_metadata` reads the metadata of a folder; `option` names `folder`.

    Raises: InputError listing demands and images that cannot be read.
    """
    # The --out folder of --suite geneval has them in a folder of their own.
    root = folder / "images" if (folder / "images").is_dir() else folder
    try:
        numbered = [path for path in root.iterdir() if path.name.isdigit() and path.is_dir()]
    except OSError as error:
        raise InputError(
            f"{option}: {root}: {error.strerror}; expected a folder with NUMBER/metadata.jsonl and "
            "NUMBER/samples/*.png"
        ) from error
    problems, images = Problems(), []
    for path in sorted(numbered, key=lambda path: (int(path.name), path.name)):
        metadata = problems.attempt(read_metadata, path / "metadata.jsonl")
        samples = path / "samples"
        names = sorted(samples.iterdir()) if samples.is_dir() else []
        pictures = [p for p in names if SAMPLE_NAME.match(p.name) and p.is_file()]
        if not pictures:
            problems.add(f"{samples}: found no images; expected 0000.png and others")
        for picture in pictures:
            problems.attempt(check_picture, picture)
            if metadata is not None:
                images.append((picture, metadata))
    if not numbered:
        problems.add(
            f"{option}: {root}: found no folders that are numbers; expected 00000, 00001, .. as "
            "--suite geneval writes them"
        )
    problems.raise_any()
    return images


def check_picture(path: Path) -> None:
    """Checks the sums in an image file, without decoding it. Raises: InputError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors of a damaged PNG
        raise InputError(
            f"{path}: cannot be read ({take_first_line(error)}); draw it again"
        ) from error
