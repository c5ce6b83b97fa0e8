"""Reads the files of a run directory for its report; what is missing or damaged is left out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from corl_jax.config.yaml_text import parse_yaml
from corl_jax.estimates import Estimate, read_estimate
from corl_jax.runs.directory import CONFIG_CHANGES, PROVENANCE, SUMMARY, RunDir
from corl_jax.runs.json_lines import read_lines

EVALUATION = "eval/"

Points = list[tuple[int, float]]
"""(step, value) of a metric, in order of steps."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run directory says of its run."""

    root: Path
    name: str  # in legends and heads of columns
    config: dict[str, Any]
    changes: list[dict[str, Any]]  # of config_changes.jsonl
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]
    provenance: dict[str, Any]
    notes: list[str]  # sentences about files that are missing or damaged

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [line for line in self.lines if any(key.startswith(EVALUATION) for key in line)]

    @property
    def last_step(self) -> int:
        """The newest step that was logged; 0 without lines."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run; None if it is not known."""
        found_steps = self.provenance.get("steps", self.get_option("train", "max_steps"))
        return found_steps if isinstance(found_steps, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its results and has no steps left."""
        steps = self.summary.get("steps")
        return isinstance(steps, int) and steps >= max(self.last_step, self.total_steps or 0)

    def get_option(self, *keys: str) -> Any:
        """Returns the value of an option of the config; None if there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def list_metrics(self) -> list[str]:
        """Returns the names of all metrics that have a number, in the order of the log."""
        names = (
            name for line in self.lines for name in line if read_number(line, name) is not None
        )
        return [name for name in dict.fromkeys(names) if name != "step"]

    def read_points(self, name: str) -> Points:
        """Returns the numbers of a metric. Of several with one step the last one counts."""
        values = {line["step"]: read_number(line, name) for line in self.lines if name in line}
        return [(step, value) for step, value in sorted(values.items()) if value is not None]

    def read_estimates(self, name: str) -> list[tuple[int, Estimate]]:
        """Returns (step, estimate) of a metric of the evaluations."""
        values = {line["step"]: read_estimate(line, name) for line in self.lines if name in line}
        return [(step, value) for step, value in sorted(values.items()) if value is not None]


def read_number(line: dict[str, Any], name: str) -> float | None:
    """Returns a number of a line; None for what is no finite number."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_runs(runs: Sequence[Path]) -> list[RunRecord]:
    """Reads runs, each with a name of its own."""
    return [read_run(run, name) for run, name in zip(runs, choose_names(runs), strict=True)]


def choose_names(runs: Sequence[Path]) -> list[str]:
    """Returns the last two parts of the paths, or more where these are equal."""
    paths = [Path(os.path.abspath(run)) for run in runs]

    def take_ends(length: int) -> list[str]:
        return ["/".join(path.parts[-length:]) for path in paths]

    # Two, because many runs are called `train`: x/train, y/train.
    most = max(2, *(len(path.parts) for path in paths))
    lengths = (
        length for length in range(2, most) if len(set(take_ends(length))) == len(set(paths))
    )
    names = take_ends(next(lengths, most))
    # The same run twice: numbers tell the columns apart.
    return [
        f"{name} ({names[:at].count(name) + 1})" if names.count(name) > 1 else name
        for at, name in enumerate(names)
    ]


def read_run(root: Path, name: str) -> RunRecord:
    """Reads a run directory."""
    notes: list[str] = []
    directory = RunDir(root)
    lines = [record for _, record in read_lines(directory.metrics)]
    if not lines:
        notes.append("metrics.jsonl has no lines yet, so there are no curves.")
    elif damaged := count_lines(directory.metrics) - len(lines):
        notes.append(f"{damaged} line(s) of metrics.jsonl could not be read and are left out.")
    config = _read_config(directory.config, notes)
    return RunRecord(
        root, name, config, list(_read_changes(directory)), lines,
        _read_object(directory, SUMMARY, notes),
        _read_object(directory, PROVENANCE, notes), notes,
    )  # fmt: skip


def count_lines(path: Path) -> int:
    """Returns the number of lines of a file that are not empty."""
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Reads the config as plain values, because an older one may be invalid by now."""
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"config.yaml could not be read ({type(error).__name__}).")
        return {}
    return config if isinstance(config, dict) else {}


def _read_object(directory: RunDir, name: str, notes: list[str]) -> dict[str, Any]:
    value = directory.read_json(name)
    if value is None and directory.path(name).exists():
        notes.append(f"{name} could not be read.")
    return value or {}


def _read_changes(directory: RunDir) -> Iterator[dict[str, Any]]:
    path = directory.path(CONFIG_CHANGES)
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(record, dict) and isinstance(record.get("changes"), list):
            yield record
