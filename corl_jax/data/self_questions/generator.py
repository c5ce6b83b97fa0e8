"""Makes records without end and without images, each from a seed and its index alone.

Categories are equally likely, and so are the objects, numbers, colours and relations in each.
Records that a benchmark asks can be left out: `read_excluded` reads GenEval's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corl_jax.atomic_files import create_folder
from corl_jax.data.self_questions.objects import COLORS, COUNTS, OBJECTS, RELATIONS, TAGS
from corl_jax.data.self_questions.reader import Excluded
from corl_jax.data.self_questions.records import COLUMNS, Record, make_record
from corl_jax.errors import InputError

ROW_GROUP = 1000
MOST_DRAWS = 1000  # of one record before its category counts as excluded completely
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])


def make_generated_record(seed: int, index: int, excluded: Excluded | None = None) -> Record:
    """Makes record `index` of a seed. It does not depend on other indices.

    Raises: InputError if the excluded records leave none of the category.
    """
    # A stream for each record, so that any of them can be made without the ones before it.
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    # The category is sampled once, so that excluded records do not change the fractions.
    tag = TAGS[int(rng.integers(len(TAGS)))]
    for _ in range(MOST_DRAWS):
        record = make_record(tag, _sample_include(rng, tag))
        if not excluded or record not in excluded:
            return record
    raise InputError(
        f"record {index}: the excluded records leave none of the category {tag} in {MOST_DRAWS:,} "
        "tries; exclude fewer"
    )


def _sample_include(rng: np.random.Generator, tag: str) -> list[dict[str, Any]]:
    pair = tag in ("two_object", "position", "color_attr")
    nouns = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[: 2 if pair else 1]]
    include: list[dict[str, Any]] = [{"class": noun, "count": 1} for noun in nouns]
    if tag == "counting":
        include[0]["count"] = [*COUNTS][int(rng.integers(len(COUNTS)))]
    if tag in ("colors", "color_attr"):
        for entry, color in zip(include, rng.permutation(len(COLORS)), strict=False):
            entry["color"] = COLORS[color]
    if tag == "position":
        include[1]["position"] = [RELATIONS[int(rng.integers(len(RELATIONS)))], 0]
    return include


class GeneratedRecords:
    """A data source of generated records. Rows are made when they are asked for."""

    def __init__(self, rows: int, seed: int, excluded: Excluded | None = None):
        self.names = {name: name for name in COLUMNS}
        self._rows, self._seed, self._excluded = rows, seed, excluded

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self._rows:
            raise IndexError(row)
        return dict(make_generated_record(self._seed, row, self._excluded).as_row())

    def column(self, name: str) -> list:
        return [self[row][name] for row in range(len(self))]

    def where(self, row: int) -> str:
        return f"generated record {row}"

    def fingerprint(self) -> None:
        """Returns None: no run resumes in the middle of these rows."""


class WrittenRecords:
    """A data source of records that a file holds; see `reader.read_records`."""

    def __init__(self, records: list[Record], path: Path):
        self.names = {name: name for name in COLUMNS}
        self._records, self._path = records, path

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._records[row].as_row())

    def column(self, name: str) -> list:
        return [record.as_row()[name] for record in self._records]

    def where(self, row: int) -> str:
        return f"{self._path} record {row}"

    def fingerprint(self) -> None:
        """Returns None: no run resumes in the middle of these rows."""


def write_records(out: Path, source: GeneratedRecords | WrittenRecords, start: int = 0) -> Path:
    """Writes the records from number `start` on into a new directory; returns the parquet file."""
    name = "train-00000-of-00001.parquet"
    with create_folder(out) as folder, pq.ParquetWriter(folder / name, SCHEMA) as writer:
        for first in range(start, len(source), ROW_GROUP):
            last = min(first + ROW_GROUP, len(source))
            rows = [source[row] for row in range(first, last)]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return out / name
