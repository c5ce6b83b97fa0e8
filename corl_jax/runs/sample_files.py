"""Writes the completions of a step as a Parquet file, which pandas and Hugging Face datasets read.

samples/step_NNNNNN.parquet has one row per completion. Column -> what it is:

step, task             steps done; name of the task
row, completion        number of the prompt in the step, and of the completion in its group
prompt                 the prompt or question
question               what was asked about the generated image; null without such a question
image                  the generated image; for an answer the image of its question
text, solution         the answer and its solution; null for images
plan                   the text that the policy wrote before the image; null without one
length                 tokens of the completion
reward                 weighted sum of the task's rewards; null where none applies
reward_NAME            each reward of the tasks; null where it does not apply
advantage              compared with the group
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.atomic_files import replace_file
from corl_jax.errors import take_first_line

TYPES = {
    "step": "int64", "task": "string", "row": "int64", "completion": "int64", "prompt": "string",
    "question": "string", "image": "image", "text": "string", "plan": "string",
    "solution": "string", "length": "int64", "reward": "float64",
}  # fmt: skip
"""Column -> type, in the order of the file; then the rewards and the advantage, all float64."""
REWARD_PREFIX = "reward_"


def write_samples(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes one row per record, whole or not at all. Makes the folder.

    A record has the columns of `TYPES` and `advantage`, and any columns `reward_NAME`. Columns
    that a record lacks are null, and so is NaN. An image is a PIL image or [H, W, 3] uint8.

    Raises:
        OSError: the file cannot be written.
        ValueError: a column has values of another type.
    """
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = _make_table(records)
    with replace_file(path) as file:
        pq.write_table(table, file, compression="zstd", use_dictionary=True)


def _make_table(records: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow as pa

    def convert(name: str, kind: str) -> Any:
        values = [_drop_nan(record.get(name)) for record in records]
        try:
            return pa.array(_encode_images(values) if kind == "image" else values, arrow[kind])
        # NumPy, PIL and pyarrow each have errors of their own for what they do not know.
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"column {name}: {take_first_line(error)}") from error

    names = dict.fromkeys(name for record in records for name in record)
    rewards = [name for name in names if name.startswith(REWARD_PREFIX)]
    types = TYPES | dict.fromkeys([*rewards, "advantage"], "float64")
    arrow = {"int64": pa.int64(), "string": pa.string(), "float64": pa.float64()}
    arrow["image"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    # The names of datasets' own types, so that it decodes the images.
    features = {
        name: {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
        for name, kind in types.items()
    }
    schema = pa.schema(
        [(name, arrow[kind]) for name, kind in types.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = [convert(name, kind) for name, kind in types.items()]
    return pa.Table.from_arrays(columns, schema=schema)


def _encode_images(images: Sequence[Any]) -> list[dict[str, Any] | None]:
    """Returns the images as PNG; one that several records share is encoded once."""
    different = {id(image): image for image in images if image is not None}
    # zlib frees the interpreter's lock, so threads share the work.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pngs = pool.map(_encode_png, different.values())
        encoded = dict(zip(different, pngs, strict=True))
    return [
        None if image is None else {"bytes": encoded[id(image)], "path": None} for image in images
    ]


def _encode_png(image: Image.Image | np.ndarray) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    buffer = io.BytesIO()
    # The default level takes three times as long, for a few per cent.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _drop_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
