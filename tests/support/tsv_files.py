"""Small data sets in VLMEvalKit's TSV format, and files of predictions for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corl_jax.data.drawn_world import generator


def encode_image(seed: int = 0, side: int = 24, mode: str = "RGB") -> str:
    """Returns the base64 of a small PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]], image: str | None = None) -> Path:
    """Writes rows; a value that a row lacks is empty. `image` is that of rows without one."""
    image = encode_image() if image is None else image
    rows = [{"index": "", "image": image, "question": "What is it?", **row} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(columns)]
    lines += ["\t".join(quote(row.get(name, "")) for name in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def quote(value: Any) -> str:
    """Returns a field, quoted if it has to be."""
    text = str(value)
    is_plain = not set(text) & set('\t\n"')
    return text if is_plain else '"' + text.replace('"', '""') + '"'


def write_predictions(path: Path, answers: Mapping[Any, str]) -> Path:
    """Writes a prediction file with the columns index and prediction alone."""
    lines = ["index\tprediction", *(f"{i}\t{quote(text)}" for i, text in answers.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_drawn_world(path: Path, rows: int, kind: str) -> Path:
    """Writes choice questions ("choice") or yes/no questions of the small drawn world."""
    written, number = [], 0
    while len(written) < rows:
        row = generator.make_row(1, number, split="test", world="small")
        number += 1
        question, _, listed = row["qa_problem"].partition("\nOptions:\n")
        if not listed:
            continue
        options = dict(line.split(". ", 1) for line in listed.split("\n"))
        letter = row["qa_solution"].removeprefix("<answer>").removesuffix("</answer>")
        image = base64.b64encode(row["real_image"]["bytes"]).decode()
        common = {"index": number, "image": image, "category": row["category"]}
        if kind == "choice":
            written.append({**common, "question": question, **options, "answer": letter})
            continue
        shown = "A" if len(written) % 2 else letter
        question = f"{question} Is it {options[shown]}?"
        written.append({**common, "question": question, "answer": ["No", "Yes"][shown == letter]})
    return write_tsv(path, written)
