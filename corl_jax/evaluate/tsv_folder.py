"""The folder of the suite `tsv`: its settings, the answers so far, and the prediction file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import replace_file
from corl_jax.data.questions import to_json_line
from corl_jax.errors import InputError
from corl_jax.evaluation.manifest import MANIFEST
from corl_jax.evaluation.matching.answer_tags import split_answer
from corl_jax.evaluation.tsv.table import IMAGE, INSTALL, PREDICTION, Table, Values, import_pandas

ANSWERS = "answers.jsonl"
FORMAT = "corl-jax evaluate --suite tsv, 1"
THINKING, RAW = "thinking", "raw"
OPTIONS = {
    "model_sha256": "--model", "data_sha256": "--data", "prompt_style": "--prompt-style",
    "roles": "--roles", "max_new_tokens": "--max-new-tokens", "dtype": "--dtype", "kind": "--kind",
}  # fmt: skip
"""Setting that decides the answers -> the option that sets it."""
# Excel's files cannot hold control characters, and pandas reads a text only up to a NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the manifest whole."""
    content = json.dumps({"format": FORMAT, "settings": dict(settings)}, indent=1)
    with replace_file(out / MANIFEST) as file:
        file.write(f"{content}\n".encode())


def read_answers(out: Path) -> dict[str, str]:
    """Returns index -> answer of a folder, and removes a line that a kill cut off.

    Raises: InputError for a line that is no answer.
    """
    path = out / ANSWERS
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    answers: dict[str, str] = {}
    for number, line in enumerate(whole.decode(errors="replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            answers[str(record["index"])] = str(record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number}: is no answer ({error}); remove the line to answer it again"
            ) from error
    if len(whole) < len(content):
        with replace_file(path) as file:
            file.write(whole)
    return answers


def format_answer(index: Any, answer: str) -> bytes:
    """Returns the line of an answer."""
    return to_json_line({"index": index, "answer": answer}).encode(errors="backslashreplace")


def write_predictions(
    path: Path, table: Table, rows: Sequence[Values], answers: Mapping[str, str], mode: str
) -> None:
    """Writes the rows without images and with their predictions, as VLMEvalKit does.

    `mode` is one of ANSWER_TAG_MODES.
    """
    added = (PREDICTION, THINKING, RAW)
    columns = [name for name in table.columns if name != IMAGE and name not in added]
    records = []
    for row in rows:
        text = CONTROL.sub("", answers[str(row["index"])])
        parts = split_answer(text, mode)
        texts = dict(zip(added, (parts.prediction, parts.thinking, text), strict=True))
        records.append({**{name: row[name] for name in columns}, **texts})
    pandas = import_pandas()
    # As objects: a type that pandas finds again would print 5 as 5.0 beside an absent value.
    frame = pandas.DataFrame(records, columns=[*columns, *added], dtype=object)
    with replace_file(path) as file:
        if path.suffix == ".xlsx":
            frame.to_excel(file, index=False, engine="openpyxl")
        else:
            frame.to_csv(file, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)


def check_format(name: str) -> None:
    """Raises: InputError if a prediction file of the format cannot be written here."""
    if name == "xlsx":
        try:
            import openpyxl  # noqa: F401 (only whether it is there)
        except ImportError as error:
            raise InputError(
                f"--format xlsx: openpyxl is not installed; {INSTALL}, or leave --format out"
            ) from error
