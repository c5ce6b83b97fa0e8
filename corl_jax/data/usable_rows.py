"""Decodes and tokenises rows; counts rows that cannot be used and replaces them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.images import decode_image, take_single_image
from corl_jax.data.loader_options import LoaderOptions
from corl_jax.data.parquet import Source
from corl_jax.errors import InputError
from corl_jax.tasks import name_turns
from corl_jax.types import EncodedPrompts

ROWS_IN_MESSAGE = 5


class Encoder(Protocol):
    """The functions of a policy's processor that the loader needs; see `policies.family`."""

    def prompt_ids(self, prompt: str, columns: Mapping[str, Any]) -> list[int]: ...
    def bucket(self, length: int) -> int: ...
    def encode(
        self,
        prompt: str,
        ids: Sequence[Sequence[int]],
        images: Sequence[Any] | None = None,
        length: int | None = None,
    ) -> EncodedPrompts: ...
    def pad(self, ids: Sequence[Sequence[int]], length: int | None = None) -> EncodedPrompts: ...


class BadRow(ValueError):
    """A row that cannot be used. The message says why."""


class LongRow(BadRow):
    """A row whose prompt is longer than the limit."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One usable row: decoded columns, and unpadded token ids by `tasks.name_turns`."""

    columns: dict[str, Any]
    ids: dict[str, list[int]]


class UsableRows:
    """A source in which every index gives a usable row.

    An unusable row is replaced by the next usable row in file order; after the last row comes the
    first. Counts are of distinct rows, including those of earlier processes of the run.
    """

    def __init__(self, source: Source, processor: Encoder | None, options: LoaderOptions):
        self._source = source
        self._processor = processor
        self._options = options
        self._cache: dict[int, Example] = {}
        self._limits = {"bad": options.max_bad_fraction, "long": options.max_long_fraction}
        self._unusable: dict[str, dict[int, str]] = {"bad": {}, "long": {}}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        # The replacement depends on this row only, not on the batch: every process finds the same.
        for offset in range(len(self)):
            example = self._try_row((row + offset) % len(self))
            if example is not None:
                return example
        raise InputError("\n".join(self._summarize("bad") + self._summarize("long")))

    @property
    def left_out(self) -> dict[str, list[int]]:
        """The rows left out so far: `bad` (undecodable or empty) and `long`."""
        with self._lock:
            return {kind: sorted(rows) for kind, rows in self._unusable.items()}

    @property
    def counts(self) -> dict[str, int]:
        """The number of distinct rows of each kind in `left_out`."""
        return {kind: len(rows) for kind, rows in self.left_out.items()}

    def leave_out(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Leaves out the rows that `left_out` of an earlier process lists."""
        for kind, numbers in rows.items():
            self._unusable[kind].update(dict.fromkeys(numbers, "left out before the run resumed"))

    def exchange_left_out(self, union: Callable[[set[int]], set[int]]) -> None:
        """Leaves out the rows that other processes left out too.

        `union` returns the union of a set over all processes.

        Raises:
            InputError: the rows of all processes together are too many.
        """
        for kind, rows in self._unusable.items():
            with self._lock:
                local = set(rows)
            # Outside of the lock: the union waits for other processes, and loader threads go on.
            for row in sorted(union(local) - local):
                self._leave_out(kind, row, "as another process found")

    def tokenise_prompts(self, columns: Mapping[str, Any]) -> dict[str, list[int]]:
        """Returns the token ids of a row's prompts, by the name of the turn. Raises LongRow."""
        ids = {}
        for task in self._options.tasks:
            assert self._processor is not None  # the loader refuses tasks without one
            for name, turn in name_turns(task).items():
                ids[name] = self._processor.prompt_ids(turn.prompt, columns)
                limit = self._options.max_prompt_length
                if limit is not None and len(ids[name]) > limit:
                    raise LongRow(
                        f"its {name} prompt has {len(ids[name])} tokens, the limit is {limit}"
                    )
        return ids

    def _try_row(self, row: int) -> Example | None:
        # No lock: two threads may decode the same row, and both get an equal example.
        if row in self._cache:
            return self._cache[row]
        if any(row in rows for rows in self._unusable.values()):
            return None
        try:
            example = self.read_example(row)
            if len(self._cache) < self._options.cache_rows:
                self._cache[row] = example
            return example
        except (BadRow, InputError) as error:
            self._leave_out("long" if isinstance(error, LongRow) else "bad", row, str(error))
            return None

    def read_example(self, row: int) -> Example:
        """Reads a row. Raises BadRow or InputError if it cannot be used."""
        columns = self._source[row]
        if IMAGE_COLUMN in columns:
            columns[IMAGE_COLUMN] = take_single_image(columns[IMAGE_COLUMN])
        for name in self._options.required_columns:
            value = columns[name]
            if value is None or (isinstance(value, str) and not value.strip()):
                raise BadRow(f"{name} is {'null' if value is None else 'empty'}")
        for name, find_problem in self._options.readable.items():
            if problem := find_problem(columns.get(name), columns):
                raise BadRow(f"{name}: {problem}")
        # Tokenised before the image is decoded: a prompt that is too long saves the slower step.
        ids = self.tokenise_prompts(columns)
        if columns.get(IMAGE_COLUMN) is not None:
            limit = self._options.max_pixels
            columns[IMAGE_COLUMN] = decode_image(columns[IMAGE_COLUMN], max_pixels=limit)
        return Example(columns, ids)

    def _leave_out(self, kind: str, row: int, reason: str) -> None:
        with self._lock:
            self._unusable[kind][row] = reason
            too_many = len(self._unusable[kind]) > self._limits[kind] * len(self)
        if too_many:
            raise InputError(self._summarize(kind))

    def _summarize(self, kind: str) -> list[str]:
        with self._lock:
            rows = dict(self._unusable[kind])
        if not rows:
            return []
        what, remedy = {
            "bad": ("cannot be decoded", "repair the data or raise data.max_bad_fraction"),
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
