"""Reads and checks prompts and questions from the command line and from files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from corl_jax.data.images import decode_image
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import LONE_SURROGATE, has_lone_surrogate, read_text

EXPECTED = '; expected {"image": PATH, "question": TEXT}'


@dataclasses.dataclass(frozen=True)
class ImageQuestion:
    """A question about an image."""

    row: dict[str, Any]  # image (as given), question, and what else its line holds
    file: Path | Image  # of the image, or the image itself
    where: str  # for messages


def read_prompts(path: Path, option: str, problems: Problems) -> list[str]:
    """Reads the prompts of a text file, one per line; adds their problems to `problems`."""
    lines = read_lines(path, option, problems)
    for number, line in lines:
        problems.add(find_text_problems(f"{option} {path}: line {number}", line))
    return [line for _, line in lines]


def read_lines(path: Path, option: str, problems: Problems) -> list[tuple[int, str]]:
    """Reads every line with text; returns (line number, line). Adds problems to `problems`."""
    with problems.collect(f"{option} "):
        text = read_text(path, "UTF-8 text, one entry a line")
        # Not splitlines(): it also splits at characters such as U+2028 inside of a text.
        lines = enumerate(text.split("\n"), 1)
        filled = [(number, line.strip()) for number, line in lines if line.strip()]
        if not filled:
            raise InputError(f"{path}: found no line with text; expected some")
        return filled
    return []


def read_questions(
    path: Path, option: str, output_keys: Collection[str], problems: Problems
) -> list[ImageQuestion]:
    """Reads the questions of a JSON lines file; adds their problems to `problems`.

    `output_keys` must not be keys of a line.
    """
    cases = []
    for number, line in read_lines(path, option, problems):
        where = f"{option} {path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second: "[[[[..", nested too deeply
            problems.add(f"{where}: not valid JSON ({error})")
            continue
        row_problems = find_row_problems(row, output_keys)
        problems.add(row_problems, f"{where}: ")
        if not row_problems:
            cases.append(ImageQuestion(row, path.parent / row["image"], where))
    return cases


def find_row_problems(row: Any, output_keys: Collection[str]) -> list[str]:
    """Lists the problems of a line of questions."""
    if not isinstance(row, dict):
        return [f"found a {type(row).__name__}{EXPECTED}"]
    problems = [
        f"{key} is a key of the output; expected another name" for key in output_keys if key in row
    ]
    for key in ("image", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            problems.append(f"{key} is {row.get(key)!r}{EXPECTED}")
    halves = [key for key, value in row.items() if holds_surrogate({key: value})]
    return problems + [f"{ascii(key)[1:-1]} {LONE_SURROGATE}" for key in halves]


def holds_surrogate(value: Any) -> bool:
    """Returns whether a JSON value has a lone surrogate in a text or key."""
    return has_lone_surrogate(json.dumps(value, ensure_ascii=False))


def find_text_problems(where: str, text: Any) -> list[str]:
    """Lists the problems of a prompt or question, except those of a line of JSON."""
    if not isinstance(text, str):
        return [f"{where}: found {type(text).__name__}; expected a text"]
    if not text.strip():
        return [f"{where}: found an empty text; expected some"]
    return [f"{where}: {LONE_SURROGATE}"] if has_lone_surrogate(text) else []


def replace_surrogates(text: str) -> str:
    """Returns a text that a tokenizer accepts, so that the other checks can go on."""
    return text.encode("utf-8", "replace").decode()


def check_images(cases: Sequence[ImageQuestion], problems: Problems) -> None:
    """Decodes every image once, so that a bad image is found before the work begins."""
    for case in cases:
        with problems.collect(f"{case.where}: {case.file}: "):
            decode_image(case.file)


def to_json_line(value: Any) -> str:
    """Returns a value as one line of JSON with its line end."""
    # Some readers take these characters for the end of a line; JSON need not escape them.
    text = json.dumps(value, ensure_ascii=False)
    for character in "\u2028\u2029\x85":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"
