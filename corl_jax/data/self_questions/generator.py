"""Makes records without end and without images, each from a seed and its index alone.

Categories are equally likely, and so are the objects, numbers, colours and relations in each.
Records that a benchmark asks can be left out: `read_excluded` reads GenEval's file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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


def write_records(out: Path, records: Iterable[Record]) -> Path:
    """Writes records into a new directory; returns the parquet file."""
    name = "train-00000-of-00001.parquet"
    with create_folder(out) as folder, pq.ParquetWriter(folder / name, SCHEMA) as writer:
        rest = (record.as_row() for record in records)
        while rows := list(itertools.islice(rest, ROW_GROUP)):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return out / name
