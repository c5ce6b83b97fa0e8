"""The rows of a source that can be used: decoded, tokenised, and in the place of those that cannot.

An unusable row gives way to the next usable one of the file, which depends on the row alone.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.images import decode_image, take_single_picture
from corl_jax.data.parquet import Source
from corl_jax.errors import InputError
from corl_jax.policies.janus.prompts import Processor

ROWS_IN_MESSAGE = 5


class BadRow(ValueError):
    """A row that cannot be used; the message says why."""


class LongRow(BadRow):
    """A row whose prompt is longer than the limit."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One usable row: decoded columns and, by task, unpadded token ids."""

    columns: dict[str, Any]
    ids: dict[str, list[int]]


class UsableRows:
    """A source in which every index gives a usable row; unusable ones are counted.

    An unusable row is replaced by the next usable one in file order, the end followed by the
    start. Counts are of distinct rows, those of earlier processes of the run included.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor | None,
        tasks: Sequence[str],
        required: Sequence[str],
        *,
        max_prompt_length: int | None,
        max_bad_fraction: float,
        max_long_fraction: float,
        max_pixels: int,
        cache_rows: int,
        readable: Mapping[str, Callable[[Any], str | None]] = MappingProxyType({}),
    ):
        self._source = source
        self._cache_rows = cache_rows
        self._cache: dict[int, Example] = {}
        self._processor = processor
        self._tasks = tuple(tasks)
        self._required = tuple(required)
        self._max_prompt_length = max_prompt_length
        self._limits = {"bad": max_bad_fraction, "long": max_long_fraction}
        self._max_pixels = max_pixels
        self._readable = readable
        self._unusable: dict[str, dict[int, str]] = {"bad": {}, "long": {}}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        for offset in range(len(self)):
            example = self._try((row + offset) % len(self))
            if example is not None:
                return example
        raise InputError("\n".join(self._summary("bad") + self._summary("long")))

    @property
    def left_out(self) -> dict[str, list[int]]:
        """Rows left out so far: `bad` (undecodable or empty) and `long`."""
        with self._lock:
            return {kind: sorted(rows) for kind, rows in self._unusable.items()}

    @property
    def counts(self) -> dict[str, int]:
        """How many distinct rows `left_out` has of each kind."""
        return {kind: len(rows) for kind, rows in self.left_out.items()}

    def leave_out(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Takes over `left_out` of an earlier process."""
        for kind, listed in rows.items():
            self._unusable[kind].update(dict.fromkeys(listed, "left out before the run resumed"))

    def share(self, union: Callable[[set[int]], set[int]]) -> None:
        """Counts rows that other processes left out, too; `union` is over all processes.

        Raises:
            InputError: together they are too many.
        """
        for kind, rows in self._unusable.items():
            with self._lock:
                own = set(rows)
            for row in sorted(union(own) - own):
                self._leave_out(kind, row, "as another process found")

    def ids(self, columns: Mapping[str, Any]) -> dict[str, list[int]]:
        """Token ids by task. Raises LongRow."""
        ids = {}
        for task in self._tasks:
            assert self._processor is not None  # the loader refuses tasks without one
            if task == "t2i":
                ids[task] = self._processor.t2i_ids(columns["prompt"])
            else:
                ids[task] = self._processor.mm2t_ids(columns["qa_problem"])
            limit = self._max_prompt_length
            if limit is not None and len(ids[task]) > limit:
                raise LongRow(
                    f"its {task} prompt has {len(ids[task])} tokens, the limit is {limit}"
                )
        return ids

    def _try(self, row: int) -> Example | None:
        if row in self._cache:
            return self._cache[row]
        if any(row in rows for rows in self._unusable.values()):
            return None
        try:
            example = self.example(row)
            if len(self._cache) < self._cache_rows:
                self._cache[row] = example
            return example
        except (BadRow, InputError) as error:
            self._leave_out("long" if isinstance(error, LongRow) else "bad", row, str(error))
            return None

    def example(self, row: int) -> Example:
        """The row itself. Raises BadRow or InputError when it is unusable."""
        columns = self._source[row]
        if IMAGE_COLUMN in columns:
            columns[IMAGE_COLUMN] = take_single_picture(columns[IMAGE_COLUMN])
        for name in self._required:
            value = columns[name]
            if value is None or (isinstance(value, str) and not value.strip()):
                raise BadRow(f"{name} is {'null' if value is None else 'empty'}")
        for name, problem_of in self._readable.items():
            if problem := problem_of(columns.get(name)):
                raise BadRow(f"{name}: {problem}")
        ids = self.ids(columns)  # before the image: cheaper to refuse
        if columns.get(IMAGE_COLUMN) is not None:
            image = decode_image(columns[IMAGE_COLUMN], max_pixels=self._max_pixels)
            columns[IMAGE_COLUMN] = image
        return Example(columns, ids)

    def _leave_out(self, kind: str, row: int, reason: str) -> None:
        with self._lock:
            self._unusable[kind][row] = reason
            too_many = len(self._unusable[kind]) > self._limits[kind] * len(self)
        if too_many:
            raise InputError(self._summary(kind))

    def _summary(self, kind: str) -> list[str]:
        with self._lock:
            rows = dict(self._unusable[kind])
        if not rows:
            return []
        what, remedy = {
            "bad": ("cannot be decoded", "mend the data or raise data.max_bad_fraction"),
            "long": (
                "are over max_prompt_length",
                "raise data.max_prompt_length, where the model has room (a begun run then needs "
                "--allow-changed-config), or shorten the prompts",
            ),
        }[kind]
        head = (
            f"data: {len(rows)} of {len(self)} rows {what}; at most {self._limits[kind]:g} of them "
            f"may be; {remedy}. The first:"
        )
        first = sorted(rows)[:ROWS_IN_MESSAGE]
        return [head, *(f"  {self._source.where(row)}: {rows[row]}" for row in first)]
