"""Makes the rows of the drawn world, in the published layout, and writes them as parquet.

    corl-jax data --out DIR --rows N --seed S
        [--world full|small] [--image-size 64] [--start K] [--split train|test|all]

Row i depends only on (seed, i, world, image size, split), so any range of rows can be written.
Splits: `train` and `test` have different demands in the categories with many combinations
(position, color_attr; one combination in five is held out). They share the other four categories,
whose few combinations every split needs. There the images still differ with the seed.

Columns: `prompt`, `real_image` (Hugging Face Image struct, PNG), `qa_problem`, `qa_solution`,
`qa_type` as published; `category`, `spec` (JSON, see `drawn_world.scene`) for the exact checker;
`caption` (everything the image shows) and `sft_answer` as supervised targets; `question`, `answer`,
`tag`, `include` are the record of self-questioning about what the prompt demands (see
`data.self_questions.records`), for training with `data.columns` {qa_problem: question,
qa_solution: answer}.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from corl_jax.atomic_files import create_folder
from corl_jax.data.drawn_world import language
from corl_jax.data.drawn_world.scene import (
    WORLDS,
    Spec,
    World,
    is_in_split,
    render,
    sample_scene,
    sample_spec,
)
from corl_jax.data.self_questions.records import make_record
from corl_jax.errors import Problems

__all__ = ["FEATURES", "make_row", "make_schema", "render", "sample_spec_of_row", "write_rows"]

ROW_GROUP = 100

TEXT_COLUMNS = (
    "prompt",
    "qa_problem",
    "qa_solution",
    "qa_type",
    "category",
    "spec",
    "caption",
    "sft_answer",
    "question",
    "answer",
    "tag",
    "include",
)
FEATURES: dict[str, Any] = {
    "prompt": {"dtype": "string", "_type": "Value"},
    "real_image": {"_type": "Image"},
} | {name: {"dtype": "string", "_type": "Value"} for name in TEXT_COLUMNS[1:]}


def make_schema() -> pa.Schema:
    """Returns the parquet schema, with the metadata by which `datasets` finds the image column."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [(n, image if f["_type"] == "Image" else pa.string()) for n, f in FEATURES.items()]
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.schema(fields, metadata=metadata)


def _make_generator(seed: int, index: int) -> np.random.Generator:
    # A stream for each row, so that any range of rows can be made without the rows before it.
    return np.random.default_rng(np.random.SeedSequence([seed, index]))


def _sample_split_spec(rng: np.random.Generator, split: str, world: World) -> Spec:
    """Samples a demand of the split."""
    # The category is sampled once and the demand again and again, so that every split has the same
    # fractions of categories.
    spec = sample_spec(rng, world=world)
    category = spec["category"]
    while not is_in_split(spec, split):
        spec = sample_spec(rng, category, world)
    return spec


def sample_spec_of_row(seed: int, index: int, split: str = "all", world: str = "full") -> Spec:
    """Returns the demand of row `index` without rendering its image."""
    return _sample_split_spec(_make_generator(seed, index), split, WORLDS[world])


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def make_row(
    seed: int,
    index: int,
    image_size: int | None = None,
    split: str = "all",
    *,
    encode: bool = True,
    world: str = "full",
) -> dict[str, Any]:
    """Makes row `index` of a world of `WORLDS`, by default with the world's image size.

    `real_image` is the Image struct, or uint8 [S, S, 3] if not `encode`.
    """
    # One generator makes all parts in this order; another order would change every row.
    chosen = WORLDS[world]
    rng = _make_generator(seed, index)
    spec = _sample_split_spec(rng, split, chosen)
    scene = sample_scene(rng, spec, chosen)
    image = render(scene, image_size or chosen.image_size)
    description = language.describe_scene(scene)
    question = language.ask_question(rng, scene, chosen)
    record = make_record(spec["category"], spec["include"])
    return {
        "prompt": language.write_caption(rng, spec),
        "real_image": {"bytes": _encode_png(image), "path": f"{index:08d}.png"}
        if encode
        else image,
        "qa_problem": question.problem,
        "qa_solution": question.solution,
        "qa_type": question.kind,
        "category": spec["category"],
        "spec": json.dumps(spec),
        "caption": f"{description}.",
        "sft_answer": language.write_answer(description, question, chosen),
        "question": record.question,
        "answer": record.answer,
        "tag": record.tag,
        "include": record.as_row()["include"],
    }


def _make_row_groups(
    rows: int, seed: int, image_size: int, start: int, split: str, world: str
) -> Iterator[pa.RecordBatch]:
    for first in range(start, start + rows, ROW_GROUP):
        last = min(first + ROW_GROUP, start + rows)
        group = [make_row(seed, i, image_size, split, world=world) for i in range(first, last)]
        yield pa.RecordBatch.from_pylist(group, schema=make_schema())


def find_number_problems(limits: Mapping[str, tuple[int, int]]) -> list[str]:
    """Lists options below their limits; `limits` are option -> (value, smallest value)."""
    return [
        f"{name}: {value} found, an integer of at least {low} expected"
        for name, (value, low) in limits.items()
        if value < low
    ]


def _check_arguments(
    out: Path, rows: int, seed: int, image_size: int, start: int, world: World
) -> None:
    problems = Problems()
    limits = {
        "--rows": (rows, 1),
        "--seed": (seed, 0),
        "--start": (start, 0),
        "--image-size": (image_size, world.min_image_size),
    }
    problems.add(find_number_problems(limits))
    if out.exists() and not out.is_dir():
        problems.add(f"--out {out}: a file found, a new or empty directory expected")
    elif out.is_dir() and any(out.iterdir()):
        problems.add(
            f"--out {out}: a directory with files found, a new or empty one expected; "
            "name another or remove it"
        )
    problems.raise_any()


def write_rows(
    out: str | Path,
    rows: int,
    seed: int,
    *,
    image_size: int | None = None,
    start: int = 0,
    split: str = "all",
    world: str = "full",
) -> Path:
    """Writes rows start..start+rows-1 into a new directory; returns the parquet file.

    Raises: InputError for numbers out of range or a directory that holds files.
    """
    out, size = Path(out), image_size or WORLDS[world].image_size
    _check_arguments(out, rows, seed, size, start, WORLDS[world])
    name = f"{'test' if split == 'test' else 'train'}-00000-of-00001.parquet"
    with create_folder(out) as folder, pq.ParquetWriter(folder / name, make_schema()) as writer:
        for batch in _make_row_groups(rows, seed, size, start, split, world):
            writer.write_batch(batch, row_group_size=ROW_GROUP)
    return out / name
