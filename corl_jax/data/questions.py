"""Prompts and questions from the command line and from files, with all that is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from corl_jax.data.images import BadImage, decode_image
from corl_jax.errors import InputError
from corl_jax.input_files import LONE_SURROGATE, has_lone_surrogate, read_text

EXPECTED = '; expected {"image": PATH, "question": TEXT}'


@dataclasses.dataclass(frozen=True)
class Case:
    """A question about a picture."""

    row: dict[str, Any]  # image (as given), question, and what else its line holds
    file: Path  # where the picture lies
    where: str  # for messages


def read_prompts(path: Path, option: str) -> tuple[list[str], list[str]]:
    """Returns the prompts of a text file, one a line, and problems."""
    lines, problems = read_lines(path, option)
    for number, line in lines:
        problems += text_problems(f"{option} {path}: line {number}", line)
    return [line for _, line in lines], problems


def read_lines(path: Path, option: str) -> tuple[list[tuple[int, str]], list[str]]:
    """Returns (line number, line) of every line with text in it, and problems."""
    try:
        lines = read_text(path, "UTF-8 text, one entry a line").split("\n")
    except InputError as error:
        return [], [f"{option} {problem}" for problem in error.problems]
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    return found, ([] if found else [f"{option} {path}: found no line with text; expected some"])


def read_cases(
    path: Path, option: str, output_keys: Collection[str]
) -> tuple[list[Case], list[str]]:
    """Returns the questions of a JSON lines file, and problems; `output_keys` are not for input."""
    lines, problems = read_lines(path, option)
    cases = []
    for number, line in lines:
        where = f"{option} {path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not valid JSON ({error})")
            continue
        wrong = row_problems(row, output_keys)
        problems += [f"{where}: {problem}" for problem in wrong]
        if not wrong:
            cases.append(Case(row, path.parent / row["image"], where))
    return cases, problems


def row_problems(row: Any, output_keys: Collection[str]) -> list[str]:
    """Lists what is wrong with a line of questions."""
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
    """True for a JSON value with a lone surrogate in any of its texts or keys."""
    return has_lone_surrogate(json.dumps(value, ensure_ascii=False))


def text_problems(where: str, text: str) -> list[str]:
    """Lists what is wrong with a prompt or question of the command line or a text file."""
    if not text.strip():
        return [f"{where}: found an empty text; expected some"]
    return [f"{where}: {LONE_SURROGATE}"] if has_lone_surrogate(text) else []


def without_surrogates(text: str) -> str:
    """Returns a text that a tokenizer takes, to look for what else is wrong with it."""
    return text.encode("utf-8", "replace").decode()


def picture_problems(cases: Sequence[Case]) -> list[str]:
    """Decodes every picture once, so that a bad one stops nothing half-way."""
    problems = []
    for case in cases:
        try:
            decode_image(case.file)
        except BadImage as error:
            problems += [f"{case.where}: {case.file}: {problem}" for problem in error.problems]
    return problems


def to_json_line(value: Any) -> str:
    """Returns a value as one line of JSON with its end.

    Characters that some readers take for the end of a line are escaped.
    """
    text = json.dumps(value, ensure_ascii=False)
    for character in "\u2028\u2029\x85":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"
