"""Makes batches of prompts from a data set.

    source = ParquetSource("train.parquet", required=required_columns(("t2i", "mm2t")))
    options = LoaderOptions(tasks=("t2i", "mm2t"), batch_size=16, seed=0)
    loader = Loader(source, processor, options)
    for prompts in loader: ...  # prepared by background threads

Batch `step` is a function of the data, the seed and the step. Position p of the order is slot p of
a shuffled, endlessly repeated pass over the rows (grain). A global batch is B consecutive
positions, and each process takes its contiguous part of them, so the order does not depend on the
number of processes. A row that cannot be used is replaced by the next usable row of the file. The
replacement depends only on that row.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.data.columns import COLUMNS, IMAGE_COLUMN
from corl_jax.data.loader_options import LoaderOptions
from corl_jax.data.parquet import ParquetSource, Rows, Source, split_held_out_rows
from corl_jax.data.usable_rows import BadRow, Encoder, Example, LongRow, UsableRows
from corl_jax.errors import InputError, Problems
from corl_jax.tasks import TASKS, required_columns
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
        """`processor` may be None if `options` names no tasks."""
        options.check(list(source.names), has_processor=processor is not None)
        self.source = source
        self.processor = processor
        self.options = options
        self._step = 0
        self._rows = UsableRows(source, processor, options)
        self._order = _make_order(self._rows, options.seed, options.shuffle)
        self.lengths = self._padded_lengths()

    @property
    def batch_size(self) -> int:
        """Rows of a batch of all processes."""
        return self.options.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was read once. The last batch may run into the next pass."""
        return -(-len(self.source) // self.batch_size)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows left out so far, including those that other processes reported."""
        return self._rows.counts

    def share_unusable(self, union: Callable[[set[int]], set[int]]) -> None:
        """Tells the other processes which rows were left out; see UsableRows.share."""
        self._rows.share(union)

    def batch(self, step: int) -> Prompts:
        """Returns this process's part of global batch `step`."""
        part = self.batch_size // self.options.process_count
        first = step * self.batch_size + self.options.process_index * part
        return self.at(np.arange(first, first + part, dtype=np.int64))

    def at(self, index: np.ndarray) -> Prompts:
        """Returns the rows at positions `index` of the order, of any process."""
        examples = [self._order[int(position)] for position in index]
        columns = {name: [e.columns[name] for e in examples] for name in self.source.names}
        encoded = {task: self._encode(task, examples, columns) for task in self.options.tasks}
        return Prompts(index, columns, encoded)

    def iterate(self, start: int, stop: int) -> Iterator[Prompts]:
        """Returns batches `start` to `stop` - 1, prepared ahead by background threads."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(
            num_threads=self.options.threads, prefetch_buffer_size=self.options.prefetch
        )
        return iter(steps.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Prompts]:
        """Yields batches from the current step on, without end."""
        for prompts in self.iterate(self._step, 2**31):
            # Counted before the batch is used, so the state is always that of the next batch.
            self._step += 1
            yield prompts

    def get_state(self) -> dict[str, Any]:
        """Returns the step, the rows left out, and what identifies the data."""
        return {"step": self._step, "left_out": self._rows.left_out, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `get_state`, at the next `iter()`.

        Raises:
            InputError: the state belongs to another data set, seed or batch size.
        """
        problems = Problems()
        for name, value in self._identity().items():
            if state.get(name) != value:
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
            InputError: none of the first `rows` rows can be used; gives the reason of each.
        """
        rows = min(rows, len(self.source))
        problems = Problems()
        usable = 0
        for row in range(rows):
            try:
                self._rows.example(row)
                usable += 1
            except (BadRow, InputError) as error:
                problems.add(f"{self.source.where(row)}: {error}")
        if not usable:
            problems.raise_any()

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.options.seed,
            "batch_size": self.batch_size,
            "rows": len(self.source),
            "shuffle": int(self.options.shuffle),
        }

    def _encode(
        self, task: str, examples: Sequence[Example], columns: Mapping[str, list]
    ) -> EncodedPrompts:
        assert self.processor is not None
        ids = [example.ids[task] for example in examples]
        images = columns[IMAGE_COLUMN] if IMAGE_COLUMN in TASKS[task].columns else None
        return self.processor.encode(TASKS[task].turn.prompt, ids, images, self.lengths.get(task))

    def _padded_lengths(self) -> dict[str, int]:
        """Returns the padded prompt length of each task; empty if each batch has its own."""
        padding, tasks = self.options.padding, self.options.tasks
        if isinstance(padding, Mapping):
            return dict(padding)
        if padding == "batch" or self.processor is None:
            return {}
        longest: collections.Counter[str] = collections.Counter()
        names = [name for name in required_columns(tasks) if name != IMAGE_COLUMN]
        for texts in zip(*(self.source.column(name) for name in names), strict=True):
            if not all(isinstance(text, str) and text.strip() for text in texts):
                continue
            try:
                ids = self._rows.ids(dict(zip(names, texts, strict=True)))
            except LongRow:
                continue
            for task in tasks:
                longest[task] = max(longest[task], len(ids[task]))
        if not longest:
            raise InputError("data: no row has a usable prompt; see max_prompt_length")
        return {task: self.processor.bucket(length) for task, length in longest.items()}


def _make_order(rows: Any, seed: int, shuffle: bool) -> Any:
    """Returns the endless sequence of examples, by position."""
    import grain

    passes = grain.MapDataset.source(rows)
    if shuffle:
        passes = passes.seed(seed).shuffle()
    return passes.repeat()
