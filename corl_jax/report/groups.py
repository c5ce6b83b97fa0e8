"""Reads the groups of completions of a step, and chooses the best and the worst ones."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from corl_jax.report.gallery import encode_image
from corl_jax.runs.directory import SAMPLES, RunDir
from corl_jax.tasks import PLAN_COLUMN, TASKS

SHOWN_GROUPS, SHOWN_COMPLETIONS = 3, 8
SIDE = 128  # pixels of an image
COLUMNS = ("task", "row", "completion", "prompt", "text", "solution", "reward", "advantage")


@dataclasses.dataclass(frozen=True)
class Completion:
    """An image or a text of a group."""

    uri: str | None  # of the generated image
    text: str | None  # the answer
    plan: str | None  # that was written before the image
    reward: float | None
    advantage: float | None


@dataclasses.dataclass(frozen=True)
class Group:
    """The completions of a prompt."""

    prompt: str
    question: str | None  # about the generated images
    uri: str | None  # of the image that a question is about
    solution: str | None
    mean: float
    completions: list[Completion]  # by falling reward
    left_out: int


@dataclasses.dataclass(frozen=True)
class TaskGroups:
    """The best and the worst groups of a task."""

    task: str
    step: int
    best: list[Group]
    worst: list[Group]


def read_groups(run: Path, notes: list[str]) -> list[TaskGroups]:
    """Returns the best and the worst groups of the newest step with samples, by task.

    Adds a sentence on files that cannot be read to `notes`.
    """
    for path in sorted(RunDir(run).samples.glob("step_*.parquet"), reverse=True):
        try:
            table = pyarrow.parquet.read_table(path)
            missing = [name for name in COLUMNS if name not in table.column_names]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}")
            return choose_groups(table, int(path.stem.rpartition("_")[2]))
        except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
            notes.append(f"{SAMPLES}/{path.name} could not be read ({error}).")
    return []


def choose_groups(table: pyarrow.Table, step: int) -> list[TaskGroups]:
    """Returns the best and the worst groups of a table of samples, by task."""
    members: dict[tuple[str, int], list[int]] = {}
    names, rows = table["task"].to_pylist(), table["row"].to_pylist()
    for at, (task, row) in enumerate(zip(names, rows, strict=True)):
        members.setdefault((str(task), row), []).append(at)
    rewards = [math.nan if value is None else value for value in table["reward"].to_pylist()]
    chosen = []
    for task in dict.fromkeys(name for name, _ in members):
        groups = [of_row for (name, _), of_row in members.items() if name == task]
        means = {of_row[0]: _mean([rewards[at] for at in of_row]) for of_row in groups}
        ranked = sorted(
            (of_row for of_row in groups if not math.isnan(means[of_row[0]])),
            key=lambda of_row: -means[of_row[0]],
        )
        # Of few groups none is both among the best and among the worst.
        count = min(SHOWN_GROUPS, len(ranked) // 2 or 1)
        best, worst = ranked[:count], ranked[count:][-count:][::-1]
        chosen.append(TaskGroups(
            task, step, [_read_group(table, of_row) for of_row in best],
            [_read_group(table, of_row) for of_row in worst],
        ))  # fmt: skip
    return chosen


def _mean(values: Sequence[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def _read_group(table: pyarrow.Table, of_row: Sequence[int]) -> Group:
    records = table.take(pyarrow.array(of_row)).to_pylist()
    records.sort(key=lambda record: -(_number(record["reward"]) or 0.0))
    # Both ends of a large group, because the middle says least.
    half = SHOWN_COMPLETIONS // 2
    shown = records
    if len(records) > SHOWN_COMPLETIONS:
        shown = [*records[:half], *records[-half:]]
    task = TASKS.get(records[0]["task"])
    asks = not task.makes_image if task else records[0]["text"] is not None
    completions = [
        Completion(
            None if asks else _encode_bytes(record.get("image")),
            record["text"], record.get(PLAN_COLUMN),
            _number(record["reward"]), _number(record["advantage"]),
        )
        for record in shown
    ]  # fmt: skip
    return Group(
        str(records[0]["prompt"] or ""),
        records[0].get("question"),
        _encode_bytes(records[0].get("image")) if asks else None,
        records[0]["solution"],
        _mean([math.nan if record["reward"] is None else record["reward"] for record in records]),
        completions,
        len(records) - len(shown),
    )


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _encode_bytes(image: Mapping[str, Any] | None) -> str | None:
    """Returns the data URI of an image file's bytes; None for none and for damaged ones."""
    content = (image or {}).get("bytes")
    if not content:
        return None
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return encode_image(np.asarray(picture.convert("RGB")), SIDE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # shown as missing, like an image that was not kept
