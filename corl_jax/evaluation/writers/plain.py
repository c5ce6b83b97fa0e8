"""Any list of prompts: a text, JSON lines, or a table with a column `Prompt`, as PartiPrompts."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.writers.writer import (
    IMAGES,
    HarnessPrompt,
    ImageFile,
    Outcome,
    PromptList,
    Writer,
    check_single_path,
    check_text,
    list_filled_lines,
    read_prompt_lines,
)

EXPECTED = (
    "a file of prompts: a text with one a line, JSON lines with a key prompt, or a .tsv table with "
    "a column Prompt"
)
CATEGORY_KEYS = ("category", "tag")


def read_file(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the prompts of a file, in its order."""
    path = check_single_path(paths, EXPECTED)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected {EXPECTED}")
    lines = list_filled_lines(path, EXPECTED)
    start = lines[0][1]
    if start[0] == "{":
        rows = [
            (f"line {number}: prompt", row.get("prompt"), _read_category(row), line)
            for number, line, row in read_prompt_lines(path, EXPECTED, problems)
        ]
    elif start[0] == "[":
        raise InputError(f"{path}: begins with [, as a list in JSON; expected {EXPECTED}")
    elif "\t" in start:
        rows = _read_table(path, [line for _, line in lines])
    else:
        rows = [(f"line {number}", line, "", line) for number, line in lines]
    prompts = tuple(
        HarnessPrompt(check_text(text, f"{path}: {where}", problems), f"{i:05d}", category, source)
        for i, (where, text, category, source) in enumerate(rows)
    )
    return PromptList(prompts, (path,))


def _read_category(row: dict) -> str:
    values = (row.get(key) for key in CATEGORY_KEYS)
    return next((value for value in values if isinstance(value, str)), "")


def _read_table(path: Path, lines: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Reads (place, prompt, category, prompt) of the rows of a table."""
    # PartiPrompts has texts with quotation marks in its cells, which are no quoting of the table.
    table = csv.reader(io.StringIO("\n".join(lines)), delimiter="\t", quoting=csv.QUOTE_NONE)
    header, *rows = list(table)
    names = [name.strip().lower() for name in header]
    if "prompt" not in names:
        raise InputError(
            f"{path}: its first line has the columns {', '.join(header)}; expected {EXPECTED}"
        )
    place = names.index("prompt")
    category = next((names.index(key) for key in CATEGORY_KEYS if key in names), None)
    cells = [row + [""] * len(names) for row in rows]
    return [
        (f"row {number}", row[place], "" if category is None else row[category], row[place])
        for number, row in enumerate(cells, 1)
    ]


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists PROMPT_SAMPLE.png, as the command `generate` names images."""
    return [
        ImageFile(f"{IMAGES}/{prompt.name}_{sample:02d}.png", number, (sample,))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def describe_next(outcome: Outcome) -> str:
    """Returns the command that compares two evaluations."""
    out = shlex.quote(str(outcome.out))
    return f"# compare with another model's evaluation\ncorl-jax compare OTHER {out}\n"


WRITER = Writer(
    title="the list", expected=EXPECTED, read=read_file, images_per_prompt=1,
    list_files=list_files, describe_next=describe_next, is_specific=False,
)  # fmt: skip
