"""Files to `Prompts`: batch `step` is a pure function of the data, the seed and the step.

    source = ParquetSource("train.parquet", required=required_columns(("t2i", "mm2t")))
    loader = Loader(source, processor, tasks=("t2i", "mm2t"), batch_size=16, seed=0)
    for prompts in loader: ...        # prefetched; loader.get_state() is the next step

Position p of the order is slot p of a shuffled, endlessly repeated pass over the rows (grain).
A global batch is B consecutive positions and each process takes its contiguous share, so the
order does not depend on the number of processes. A row that cannot be used gives way to the
next usable row of the file, which depends on the row alone.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from corl_jax.data.columns import COLUMNS, IMAGE_COLUMN
from corl_jax.data.images import MAX_PIXELS
from corl_jax.data.parquet import ParquetSource, Rows, Source, held_out
from corl_jax.data.usable_rows import BadRow, Example, LongRow, UsableRows
from corl_jax.errors import InputError
from corl_jax.policies.janus.prompts import Processor
from corl_jax.types import EncodedPrompts, Prompts

__all__ = ["COLUMNS", "Loader", "ParquetSource", "Rows", "Source", "held_out", "required_columns"]

TASK_COLUMNS = {"t2i": ("prompt",), "mm2t": ("real_image", "qa_problem")}
ROWS_CHECKED_AT_START = 8
MAX_SEED = 2**32 - 1  # grain's shuffle takes 32 bits


def required_columns(tasks: Sequence[str]) -> tuple[str, ...]:
    """Standard columns that the tasks' prompts are made of; rewards may need more."""
    return tuple(dict.fromkeys(name for task in tasks for name in TASK_COLUMNS[task]))


class Loader:
    """Batches of prompts in an order that only the data, the seed and the step decide.

    `batch_size` is the global B. Each process of `process_count` gets B / process_count rows.
    `tasks` says which prompts to encode (`t2i`, `mm2t`); with none, batches hold columns only
    and no processor is needed. `required` names columns that must not be null besides those of
    the tasks, for the rewards; `readable` says, by column, what is wrong with a row's value (None:
    nothing). `max_prompt_length` counts every token, image slots included.
    `lengths`: `batch` pads to the bucket of the batch, `dataset` to that of the longest prompt
    of the whole data set, which processes need in order to agree; the default is `dataset`
    with several processes. Or a dict of lengths by task. `cache_rows`: decoded rows that stay in
    memory, for data that is small and read many times.
    `prefetch` batches are made ahead by `threads` threads. Their number does not change any
    batch; only where a run with too many bad rows stops is not exact beyond one.

    Raises:
        InputError: on construction for wrong arguments, and while reading when more than
            `max_bad_fraction` (or `max_long_fraction`) of the rows had to be left out.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor | None,
        *,
        tasks: Sequence[str],
        batch_size: int,
        seed: int,
        required: Sequence[str] = (),
        readable: Mapping[str, Callable[[Any], str | None]] = MappingProxyType({}),
        shuffle: bool = True,
        max_prompt_length: int | None = None,
        lengths: str | Mapping[str, int] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        max_bad_fraction: float = 0.01,
        max_long_fraction: float = 0.5,
        max_pixels: int = MAX_PIXELS,
        cache_rows: int = 0,
        threads: int = 1,
        prefetch: int = 2,
    ):
        self.source = source
        self.processor = processor
        self.tasks = tuple(tasks)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.process_index, self.process_count = process_index, process_count
        self._threads, self._prefetch = threads, prefetch
        self._step = 0
        if lengths is None:
            lengths = "dataset" if process_count > 1 else "batch"
        self._check_arguments(required, lengths)
        self._rows = UsableRows(
            source,
            processor,
            self.tasks,
            (*required_columns(self.tasks), *required),
            max_prompt_length=max_prompt_length,
            max_bad_fraction=max_bad_fraction,
            max_long_fraction=max_long_fraction,
            max_pixels=max_pixels,
            cache_rows=cache_rows,
            readable=readable,
        )
        self._order = _order(self._rows, seed, shuffle)
        self.lengths = self._fixed_lengths(lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row has come up once; the last batch may run into the next pass."""
        return -(-len(self.source) // self.batch_size)

    @property
    def counts(self) -> dict[str, int]:
        """Distinct rows left out so far by this process, and by all as far as they were shared."""
        return self._rows.counts

    def share_unusable(self, union: Callable[[set[int]], set[int]]) -> None:
        """As UsableRows.share: the processes tell each other what they left out."""
        self._rows.share(union)

    def batch(self, step: int) -> Prompts:
        """This process's share of global batch `step`."""
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        return self.at(np.arange(first, first + share, dtype=np.int64))

    def at(self, index: np.ndarray) -> Prompts:
        """The rows at positions `index` of the order, whatever process they belong to."""
        examples = [self._order[int(position)] for position in index]
        columns = {name: [e.columns[name] for e in examples] for name in self.source.names}
        encoded = {task: self._encode(task, examples, columns) for task in self.tasks}
        return Prompts(index, columns, encoded.get("t2i"), encoded.get("mm2t"))

    def iterate(self, start: int, stop: int) -> Iterator[Prompts]:
        """Batches `start` to `stop` - 1, made ahead of time by background threads."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        return iter(steps.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Prompts]:
        """Endless batches from the current step on; the state is that of the next batch."""
        for prompts in self.iterate(self._step, 2**31):
            self._step += 1
            yield prompts

    def get_state(self) -> dict[str, Any]:
        """The position, rows left out, and what must be the same to mean the same data."""
        return {"step": self._step, "left_out": self._rows.left_out, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. Takes effect at the next `iter()`.

        Raises:
            InputError: the state belongs to another data set, seed or batch size.
        """
        problems = [
            f"data state: {name} was {state.get(name)} and is now {value}; the order would differ"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if problems:
            raise InputError(problems)
        self._step = int(state["step"])
        self._rows.leave_out(state.get("left_out", {}))

    def check(self, rows: int = ROWS_CHECKED_AT_START) -> None:
        """Reads the first rows, so that unusable data stops a run before it starts.

        Raises:
            InputError: none of the first `rows` rows is usable, with the reason of each.
        """
        rows = min(rows, len(self.source))
        failures = {}
        for row in range(rows):
            try:
                self._rows.example(row)
            except (BadRow, InputError) as error:
                failures[row] = str(error)
        if len(failures) == rows:
            raise InputError(
                [f"{self.source.where(row)}: {reason}" for row, reason in failures.items()]
            )

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self.source),
            "shuffle": int(self.shuffle),
        }

    def _encode(
        self, task: str, examples: Sequence[Example], columns: Mapping[str, list]
    ) -> EncodedPrompts:
        assert self.processor is not None
        ids = [example.ids[task] for example in examples]
        encoded = self.processor.pad(ids, self.lengths.get(task))
        if task != "mm2t":
            return encoded
        pixels = [self.processor.preprocess_image(image) for image in columns[IMAGE_COLUMN]]
        return dataclasses.replace(encoded, pixel_values=np.stack(pixels))

    def _fixed_lengths(self, lengths: str | Mapping[str, int]) -> dict[str, int]:
        """Padded length by task; empty when every batch chooses its own."""
        if isinstance(lengths, Mapping):
            return dict(lengths)
        if lengths == "batch" or self.processor is None:
            return {}
        longest: collections.Counter[str] = collections.Counter()
        names = [name for name in required_columns(self.tasks) if name != IMAGE_COLUMN]
        for texts in zip(*(self.source.column(name) for name in names), strict=True):
            if not all(isinstance(text, str) and text.strip() for text in texts):
                continue
            try:
                ids = self._rows.ids(dict(zip(names, texts, strict=True)))
            except LongRow:
                continue
            for task in self.tasks:
                longest[task] = max(longest[task], len(ids[task]))
        if not longest:
            raise InputError("data: no row has a usable prompt; see max_prompt_length")
        return {task: self.processor.bucket(length) for task, length in longest.items()}

    def _check_arguments(self, required: Sequence[str], lengths: Any) -> None:
        problems = [
            f"tasks: found {task!r}; expected {' or '.join(TASK_COLUMNS)}"
            for task in self.tasks
            if task not in TASK_COLUMNS
        ]
        if self.tasks and self.processor is None:
            problems.append("processor: found None; encoding prompts needs one")
        if not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed: found {self.seed}; expected 0 to {MAX_SEED}")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            problems.append(
                f"batch_size: found {self.batch_size}; expected a positive multiple of the "
                f"{self.process_count} processes"
            )
        if not 0 <= self.process_index < self.process_count:
            problems.append(
                f"process_index: found {self.process_index}; expected 0 to {self.process_count - 1}"
            )
        if not isinstance(lengths, Mapping) and lengths not in ("batch", "dataset"):
            problems.append(f"lengths: found {lengths!r}; expected batch, dataset or a dict")
        wanted = () if problems else (*required_columns(self.tasks), *required)
        for name in dict.fromkeys(wanted):
            if name not in self.source.names:
                problems.append(f"data: column {name} is missing; found {list(self.source.names)}")
        if problems:
            raise InputError(problems)


def _order(rows: Any, seed: int, shuffle: bool) -> Any:
    """The endless sequence of examples, by position."""
    import grain

    passes = grain.MapDataset.source(rows)
    if shuffle:
        passes = passes.seed(seed).shuffle()
    return passes.repeat()
