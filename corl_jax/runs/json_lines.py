"""Writes and reads `metrics.jsonl`, the lines of metrics of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import replace_file
from corl_jax.runs.append_log import AppendLog
from corl_jax.runs.directory import to_json


class JsonLines:
    """Writes `metrics.jsonl`: a line for each logged step, an object of `step` and the metrics."""

    def __init__(self, path: Path, resumed_at: int | None, resumed_lines: int | None = None):
        """Drops the lines that were logged after the checkpoint of step `resumed_at`.

        The half line that a killed process leaves is dropped too.
        """
        # Lines of the same step that came after the save, such as an evaluation, are logged again.
        limit = math.inf if resumed_lines is None else resumed_lines
        self.count = 0
        self.peaks: dict[str, float] = {}  # metric -> its largest absolute value
        with replace_file(path) as file:
            for line, record in read_lines(path):
                if resumed_at is not None and record["step"] <= resumed_at and self.count < limit:
                    file.write(line)
                    self.count += 1
                    self._note_peaks(record)
        self.records = AppendLog(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes a line.

        Raises:
            OSError: it could not be written now, and is written before the next one.
        """
        record = to_json({"step": int(step), **numbers})
        self._note_peaks(record)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = self.records.lost
        try:
            self.records.add(line)  # unbuffered: a kill loses no finished line
        finally:
            # A record that waits counts: it is written later. A lost one does not.
            self.count += self.records.lost == before

    def _note_peaks(self, record: Mapping[str, float | None]) -> None:
        for name, number in record.items():
            self.peaks[name] = max(self.peaks.get(name, 0.0), abs(number or 0.0))


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields (line, record) of every whole line of a metrics file; nothing without a file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line.rstrip(b"\n") + b"\n", record
