"""Makes batches of prompts from a data set.

    source = ParquetSource("train.parquet", required=required_columns(("t2i", "mm2t")))
    options = LoaderOptions(tasks=("t2i", "mm2t"), batch_size=16, seed=0)
    loader = Loader(source, processor, options)
    for prompts in loader: ...  # prepared by background threads

Batch `step` is a function of the data, the seed and the step. grain shuffles the rows and repeats
them endlessly. A global batch is B consecutive positions of this order. Each process takes its
contiguous part of them, so the order does not depend on the number of processes. The next usable
row of the file replaces a row that cannot be used.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.data.columns import COLUMNS, IMAGE_COLUMN
from corl_jax.data.loader_options import LoaderOptions
from corl_jax.data.parquet import ParquetSource, Rows, Source, split_held_out_rows
from corl_jax.data.usable_rows import BadRow, Encoder, Example, LongRow, UsableRows
from corl_jax.errors import InputError, Problems
from corl_jax.tasks import TASKS, name_turns, required_columns
from corl_jax.types import EncodedPrompts, Prompts

__all__ = [
    "COLUMNS", "Loader", "LoaderOptions", "ParquetSource", "Rows", "Source", "required_columns",
    "split_held_out_rows",
]  # fmt: skip

ROWS_CHECKED_AT_START = 8


class Loader:
    """Batches of prompts. Their order depends only on the data, the seed and the step.

    Reading raises an InputError if more rows than `options` allows cannot be used.

    Raises:
        InputError: on construction, for wrong options and for missing columns.
    """

    def __init__(self, source: Source, processor: Encoder | None, options: LoaderOptions):
        """Opens the data. `processor` may be None if `options` names no tasks."""
        options.check(list(source.names), has_processor=processor is not None)
        self.source = source
        self.processor = processor
        self.options = options
        self._step = 0
        self._rows = UsableRows(source, processor, options)
        self._order = _make_order(self._rows, options.seed, options.shuffle)
        self.lengths = self._compute_lengths()

    @property
    def batch_size(self) -> int:
        """The number of rows of a global batch."""
        return self.options.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps for one pass. The last batch may have rows of the next pass."""
        return -(-len(self.source) // self.batch_size)

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows left out so far, with rows that other processes reported."""
        return self._rows.counts

    def share_unusable(self, union: Callable[[set[int]], set[int]]) -> None:
        """Tells the other processes which rows were left out; see UsableRows.exchange_left_out."""
        self._rows.exchange_left_out(union)

    def batch(self, step: int) -> Prompts:
        """Returns this process's part of global batch `step`."""
        part = self.batch_size // self.options.process_count
        # batch_size 16, 4 processes: step 2, process 1 -> positions 36..39
        first = step * self.batch_size + self.options.process_index * part
        return self.read_rows(np.arange(first, first + part, dtype=np.int64))

    def read_rows(self, index: np.ndarray) -> Prompts:
        """Returns the rows at positions `index` of the order, of any process."""
        examples = [self._order[int(position)] for position in index]
        columns = {name: [e.columns[name] for e in examples] for name in self.source.names}
        encoded = {task: self._encode(task, examples, columns) for task in self.options.tasks}
        return Prompts(index, columns, encoded)

    def iterate(self, start: int, stop: int) -> Iterator[Prompts]:
        """Returns batches `start` to `stop` - 1, prepared ahead by background threads."""
        import grain

        # Several threads make batches at once, but they come out in order.
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(
            num_threads=self.options.threads, prefetch_buffer_size=self.options.prefetch
        )
        return iter(steps.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Prompts]:
        """Yields batches from the current step on, without end."""
        for prompts in self.iterate(self._step, 2**31):
            # Counted before the batch is used, so the state is that of the next batch.
            self._step += 1
            yield prompts

    def get_state(self) -> dict[str, Any]:
        """Returns the step, the rows left out, and values that identify the data."""
        return {"step": self._step, "left_out": self._rows.left_out, **self._describe_identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Sets a state of `get_state`; the next `iter()` continues from it.

        Raises:
            InputError: the state belongs to another data set, seed or batch size.
        """
        problems = Problems()
        for name, value in self._describe_identity().items():
            if state.get(name, value) != value:  # older checkpoints have no fingerprint
                problems.add(
                    f"data state: {name} was {state.get(name)} and is now {value}; the order would "
                    "differ"
                )
        problems.raise_any()
        self._step = int(state["step"])
        self._rows.leave_out(state.get("left_out", {}))

    def check(self, rows: int = ROWS_CHECKED_AT_START) -> None:
        """Reads the first rows, so that a run with unusable data does not start.

        Raises:
            InputError: none of the first `rows` rows can be used. It names the reason of each.
        """
        rows = min(rows, len(self.source))
        problems = Problems()
        usable = 0
        for row in range(rows):
            try:
                self._rows.read_example(row)
                usable += 1
            except (BadRow, InputError) as error:
                problems.add(f"{self.source.where(row)}: {error}")
        if not usable:
            problems.raise_any()

    def _describe_identity(self) -> dict[str, int | str]:
        fingerprint = self.source.fingerprint()
        return {
            "seed": self.options.seed,
            "batch_size": self.batch_size,
            "rows": len(self.source),
            "shuffle": int(self.options.shuffle),
            **({"fingerprint": fingerprint} if fingerprint else {}),
        }

    def _encode(
        self, task: str, examples: Sequence[Example], columns: Mapping[str, list]
    ) -> EncodedPrompts:
        assert self.processor is not None
        turns, encoded = name_turns(task), None
        images = columns[IMAGE_COLUMN] if IMAGE_COLUMN in TASKS[task].columns else None
        # From the last turn to the first, because each holds the prompts of the next one.
        for name in reversed(turns):
            ids, length = [example.ids[name] for example in examples], self.lengths.get(name)
            if name == task:
                prompts = self.processor.encode(turns[name].prompt, ids, images, length)
            else:
                prompts = self.processor.pad(ids, length)  # the policy makes the image
            encoded = dataclasses.replace(prompts, next=encoded)
        assert encoded is not None  # every task has a turn
        return encoded

    def _compute_lengths(self) -> dict[str, int]:
        """Returns the padded prompt length of each turn; empty if it differs between batches."""
        padding, tasks = self.options.padding, self.options.tasks
        if isinstance(padding, Mapping):
            return dict(padding)
        if padding == "batch" or self.processor is None:
            return {}
        # All processes must compile the same shapes without talking, so each reads the texts of all
        # rows. Images are not read: an image has a fixed number of tokens.
        longest: collections.Counter[str] = collections.Counter()
        names = [name for name in required_columns(tasks) if name != IMAGE_COLUMN]
        for texts in zip(*(self.source.column(name) for name in names), strict=True):
            if not all(isinstance(text, str) and text.strip() for text in texts):
                continue
            try:
                ids = self._rows.tokenise_prompts(dict(zip(names, texts, strict=True)))
            except LongRow:
                continue
            for name, tokens in ids.items():
                longest[name] = max(longest[name], len(tokens))
        if not longest:
            raise InputError("data: no row has a usable prompt; see max_prompt_length")
        return {name: self.processor.bucket(length) for name, length in longest.items()}


def _make_order(rows: Any, seed: int, shuffle: bool) -> Any:
    """Returns the endless sequence of examples, by position."""
    import grain

    passes = grain.MapDataset.source(rows)
    if shuffle:
        passes = passes.seed(seed).shuffle()
    return passes.repeat()
