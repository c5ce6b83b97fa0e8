"""Reads TSV data sets and prediction files as VLMEvalKit does: by pandas, with its defaults.

The types that pandas finds are seen in prompts and in predictions. An integer column with gaps has
"5.0" in place of 5, and a text such as "None" or "NA" is absent.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.input_files import describe_lfs_pointer, is_lfs_pointer

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IMAGE, IMAGE_PATH = "image", "image_path"
PREDICTION = "prediction"
HIT = "hit"
"""A verdict in a prediction file, which WeMath's rating reads."""
INSTALL = "install it with `pip install 'corl-jax[evaluate]'`"
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d*)")

Index = int | str
Values = dict[str, Any]
"""A row: column -> value as Python has it; an absent value is None."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A data set, without the rows that have no image."""

    path: Path
    name: str  # of the data set: the file's name
    columns: tuple[str, ...]
    rows: list[Values]  # with `index`
    num_dropped: int  # rows without an image

    def where(self, row: int) -> str:
        """Returns the name of a row for messages."""
        return f"{self.path}: index {self.rows[row]['index']}"


def import_pandas() -> Any:
    """Imports pandas. Raises: InputError that says how to install it."""
    try:
        import pandas
    except ImportError as error:
        raise InputError(f"--suite tsv: pandas is not installed; {INSTALL}") from error
    return pandas


def read_table(path: Path, *, needs_images: bool = True) -> Table:
    """Reads a data set; drops the rows without an image.

    Without `needs_images` it may lack both columns of images.

    Raises:
        InputError: listing problems of the file, its columns, its indices and its questions.
    """
    columns, rows = read_frame(path, (".tsv",))
    missing = [name for name in ("index", "question") if name not in columns]
    if missing:
        raise InputError(
            f"{path}: found columns {', '.join(columns[:20])}; expected also {', '.join(missing)}, "
            "tab-separated with a header, as VLMEvalKit's TSV files"
        )
    source = next((name for name in (IMAGE, IMAGE_PATH) if name in columns), None)
    if source is None and needs_images:
        raise InputError(f"{path}: found no column image or image_path; expected one of them")
    usable = [row for row in rows if source is None or row[source] is not None]
    if not usable:
        raise InputError(f"{path}: no row has a value in column {source}; expected some")
    convert_indices(path, usable)
    table = Table(path, path.stem, tuple(columns), usable, len(rows) - len(usable))
    problems = Problems()
    problems.add(
        f"{table.where(number)}: question is empty; expected a text"
        for number, row in enumerate(usable)
        if row["question"] is None
    )
    problems.raise_any()
    return table


def read_predictions(path: Path, table: Table) -> tuple[list[Values], int]:
    """Reads a prediction file; returns the table's rows that have one, and how many have none.

    The predictions are texts as pandas makes them: an empty one is "nan".

    Raises:
        InputError: an unreadable file, a missing column, or an index that the table lacks.
    """
    columns, rows = read_frame(path, (".tsv", ".xlsx", ".json"))
    missing = [name for name in ("index", PREDICTION) if name not in columns]
    if missing:
        raise InputError(
            f"{path}: found columns {', '.join(columns[:20])}; expected also {', '.join(missing)}"
        )
    convert_indices(path, rows)
    # As text: the two files may have indices of different types, as "1" and 1.
    answers = {
        str(row["index"]): {PREDICTION: to_text(row[PREDICTION])}
        | ({HIT: row[HIT]} if HIT in row else {})
        for row in rows
    }
    known = {str(row["index"]) for row in table.rows}
    problems = Problems()
    problems.add(
        f"{path}: index {index} is not in {table.path}; expected predictions of this data set"
        for index in answers
        if index not in known
    )
    problems.raise_any()
    predicted = [row for row in table.rows if str(row["index"]) in answers]
    merged = [row | answers[str(row["index"])] for row in predicted]
    return merged, len(table.rows) - len(merged)


def to_text(value: Any) -> str:
    """Returns a prediction as VLMEvalKit reads it from a file; an absent one is "nan"."""
    return "nan" if value is None else str(value)


def read_frame(path: Path, suffixes: Sequence[str]) -> tuple[list[str], list[Values]]:
    """Reads a table by pandas' defaults; returns its columns and rows.

    Raises: InputError naming the file, what is wrong, and what was expected.
    """
    pandas = import_pandas()
    if path.suffix not in suffixes:
        raise InputError(
            f"{path}: found the ending {path.suffix!r}; expected {' or '.join(suffixes)}"
        )
    if is_lfs_pointer(path):
        raise InputError(describe_lfs_pointer(path))
    try:
        with warnings.catch_warnings():
            # The parts of a large file may have other types; VLMEvalKit reads them so too.
            warnings.simplefilter("ignore", pandas.errors.DtypeWarning)
            frame = _read_by_suffix(pandas, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected a table"
        ) from error
    except ImportError as error:  # openpyxl
        raise InputError(
            f"{path}: openpyxl is not installed; {INSTALL}, or give a .tsv file"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:  # pandas' errors are ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: is no table that pandas reads ({reason}); expected {path.suffix[1:]} with a "
            "header, in UTF-8"
        ) from error
    columns = [str(name) for name in frame.columns]
    if not columns or not len(frame):
        raise InputError(f"{path}: has no rows; expected a header and at least one row")
    frame.columns = columns
    absent = frame.isna().to_numpy()
    records = frame.astype(object).to_dict("records")
    for record, gaps in zip(records, absent, strict=True):
        for name, gap in zip(columns, gaps, strict=True):
            record[name] = None if gap else _to_python(record[name])
    return columns, records


def convert_indices(path: Path, rows: Sequence[Values]) -> None:
    """Makes all indices integers if all look like integers, else texts.

    Raises: InputError for an index that is absent or stands twice.
    """
    problems = Problems()
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        text = str(row["index"])
        if row["index"] is None:
            problems.add(f"{path}: row {number}: index is empty; expected a unique one")
        elif text in seen:
            problems.add(f"{path}: index {text} stands twice; expected each index once")
        seen.add(text)
        row["index"] = text
    problems.raise_any()
    if all(WHOLE_NUMBER.fullmatch(text) for text in seen):
        for row in rows:
            row["index"] = int(row["index"])


def list_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a row: letter -> value. An empty column is no option."""
    return {letter: row[letter] for letter in OPTION_LETTERS if row.get(letter) is not None}


def _read_by_suffix(pandas: Any, path: Path) -> Any:
    if path.suffix == ".xlsx":
        return pandas.read_excel(path)
    if path.suffix == ".json":
        return pandas.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    return pandas.read_csv(path, sep="\t")


def _to_python(value: Any) -> Any:
    # numpy's scalars print as Python's do: 5.0, 5, True.
    return value.item() if hasattr(value, "item") else value
