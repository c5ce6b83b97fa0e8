"""What a harness reads: its prompts, the names of its images, its side files and its command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.data.questions import find_text_problems
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import read_text

IMAGES = "images"
"""Folder of an evaluation with what the harness reads, and nothing else."""


@dataclasses.dataclass(frozen=True)
class HarnessPrompt:
    """A prompt of a harness. Its place in the list is its number."""

    text: str
    name: str  # unique in its list
    category: str  # of the harness; empty if it has none
    source: str  # line or file of the prompt, as the harness has it


@dataclasses.dataclass(frozen=True)
class PromptList:
    """The prompts of a harness, and the files that they were read from."""

    prompts: tuple[HarnessPrompt, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # on counts and files that the user should know of


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file that the harness reads, and the samples of a prompt that it shows."""

    path: str  # from the folder of the evaluation
    prompt: int
    samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished evaluation, as the harness's command needs it."""

    out: Path  # absolute
    prompts: PromptList
    samples: int  # images of each prompt
    side: int  # pixels of a generated image

    @property
    def images(self) -> Path:
        """The folder of the images."""
        return self.out / IMAGES


def keep_single(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the only image of a file that shows one sample."""
    (image,) = images
    return image


@dataclasses.dataclass(frozen=True)
class Writer:
    """A row of WRITERS: how a harness names its prompts and images."""

    title: str  # name of the harness
    expected: str  # what --prompts names, for messages
    # Reads files or folders; adds their problems to `problems`.
    read: Callable[[Sequence[Path], Problems], PromptList]
    images_per_prompt: int  # by default
    list_files: Callable[[Sequence[HarnessPrompt], int], list[ImageFile]]
    describe_next: Callable[[Outcome], str]  # the harness's own command, for NEXT.txt
    # most images of a prompt that the harness reads; None: any number
    max_images: int | None = None
    # path from the evaluation's folder -> text
    list_side_files: Callable[[Outcome], Mapping[str, str]] = lambda outcome: {}
    compose: Callable[[Sequence[np.ndarray]], np.ndarray] = keep_single
    is_specific: bool = True  # False: almost any text file can be read


# ---- reading


def find_source(path: Path, places: Sequence[str]) -> Path:
    """Returns the first of `places` in a folder, such as the clone of a harness, or the path."""
    found_places = (path / place for place in places if (path / place).exists())
    return next(found_places, path)


def read_prompt_lines(
    path: Path, expected: str, problems: Problems
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (line number, line, object) of a JSON lines file; adds problems of lines.

    Raises: InputError for a file that cannot be read or has no line with text.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected {expected}")
    lines = list_filled_lines(path, expected)
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{path}: line {number}: is not JSON ({error}); expected {expected}")
            continue
        if isinstance(value, dict):
            yield number, line, value
        else:
            kind = type(value).__name__
            problems.add(f"{path}: line {number}: found a {kind}; expected {expected}")


def list_filled_lines(path: Path, expected: str) -> list[tuple[int, str]]:
    """Returns (line number, line without outer white space) of the lines with text.

    Raises: InputError for a file that cannot be read or has no line with text.
    """
    # Not splitlines(): it also splits at characters such as U+2028. strip() takes the CR of CRLF.
    lines = enumerate(read_text(path, expected).split("\n"), 1)
    filled = [(number, line.strip()) for number, line in lines if line.strip()]
    if not filled:
        raise InputError(f"{path}: found no line with text; expected {expected}")
    return filled


def check_text(value: Any, where: str, problems: Problems) -> str:
    """Returns a prompt without outer white space; adds its problems, and then returns ""."""
    text_problems = find_text_problems(where, value)
    problems.add(text_problems)
    return "" if text_problems else value.strip()


def check_single_path(paths: Sequence[Path], expected: str) -> Path:
    """Returns the only path of --prompts. Raises: InputError for several."""
    if len(paths) != 1:
        raise InputError(f"found {len(paths)} paths; expected one, {expected}")
    return paths[0]


def find_doubles(names: Sequence[str]) -> list[str]:
    """Returns the names that occur more than once, each once."""
    seen: set[str] = set()
    doubles = {name: None for name in names if name in seen or seen.add(name)}
    return list(doubles)


def note_count(count: int, usual: int, what: str) -> tuple[str, ...]:
    """Returns a note unless there are as many prompts as the harness has."""
    if count == usual:
        return ()
    return (f"found {count:,} prompts; {what} has {usual:,}: its published numbers use all",)


def hash_prompts(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of a file; of several files, that of the lines of `sha256sum`."""
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if len(files) == 1:
        return sums[0]
    lines = (f"{value}  {file.name}\n" for value, file in zip(sums, files, strict=True))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


# ---- pictures


def join_in_grid(images: Sequence[np.ndarray], columns: int = 2) -> np.ndarray:
    """Joins images [S, S, 3] without gaps, row by row from the top left; a missing one is black.

    Four images, two columns: top left, top right, bottom left, bottom right.
    """
    columns = min(columns, len(images))
    side, rows = images[0].shape[0], math.ceil(len(images) / columns)
    page = np.zeros((rows * side, columns * side, 3), np.uint8)
    for number, image in enumerate(images):
        top, left = side * (number // columns), side * (number % columns)
        page[top : top + side, left : left + side] = image
    return page
