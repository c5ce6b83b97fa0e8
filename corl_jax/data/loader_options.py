"""Options of the loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corl_jax.data.images import MAX_PIXELS
from corl_jax.errors import Problems
from corl_jax.tasks import TASKS, required_columns

FindProblem = Callable[[Any, Mapping[str, Any]], str | None]
"""(value, all values of the row) -> what is wrong with the value, or None."""
MAX_SEED = 2**32 - 1  # grain's shuffle takes 32 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """The prompts that a loader makes, their rows and their order."""

    tasks: Sequence[str]  # whose prompts are encoded; without any a batch has columns only
    batch_size: int  # of all processes together
    seed: int
    shuffle: bool = True
    process_index: int = 0
    process_count: int = 1  # each process gets an equal part of every batch
    # ---- usable rows
    required: Sequence[str] = ()  # columns that must not be null, besides those of the tasks
    # column -> check of its values
    readable: Mapping[str, FindProblem] = dataclasses.field(default_factory=dict)
    max_prompt_length: int | None = None  # tokens, image slots included
    max_bad_fraction: float = 0.01  # of rows that cannot be decoded; more end the run
    max_long_fraction: float = 0.5  # of rows over max_prompt_length; more end the run
    max_pixels: int = MAX_PIXELS  # of an image
    # ---- padding
    # Padded prompt lengths. batch: of the longest prompt in each batch; dataset: of the longest
    # prompt of all rows, which all processes know without talking; or a length for each task.
    # None: dataset with several processes, else batch.
    lengths: str | Mapping[str, int] | None = None
    # ---- speed: none of these changes a batch
    cache_rows: int = 0  # decoded rows that stay in memory
    threads: int = 1  # that prepare batches; with several, a run stops later for bad rows
    prefetch: int = 2  # batches prepared ahead

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns in which a row must not be null: those of the tasks and `required`."""
        return tuple(dict.fromkeys((*required_columns(self.tasks), *self.required)))

    @property
    def padding(self) -> str | Mapping[str, int]:
        """The option `lengths`, or its default."""
        return self.lengths or ("dataset" if self.process_count > 1 else "batch")

    def check(self, columns: Sequence[str], has_processor: bool) -> None:
        """Refuses wrong options, and required columns that are not among `columns`.

        Raises:
            InputError: listing them.
        """
        problems = Problems()
        for task in self.tasks:
            if task not in TASKS:
                problems.add(f"tasks: found {task!r}; expected {' or '.join(TASKS)}")
        if self.tasks and not has_processor:
            problems.add("processor: found None; encoding prompts needs one")
        if not 0 <= self.seed <= MAX_SEED:
            problems.add(f"seed: found {self.seed}; expected 0 to {MAX_SEED}")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            problems.add(
                f"batch_size: found {self.batch_size}; expected a positive multiple of the "
                f"{self.process_count} processes"
            )
        if not 0 <= self.process_index < self.process_count:
            problems.add(
                f"process_index: found {self.process_index}; expected 0 to {self.process_count - 1}"
            )
        if not isinstance(self.padding, Mapping) and self.padding not in ("batch", "dataset"):
            problems.add(f"lengths: found {self.lengths!r}; expected batch, dataset or a dict")
        problems.raise_any()
        for name in self.required_columns:
            if name not in columns:
                problems.add(f"data: column {name} is missing; found {list(columns)}")
        problems.raise_any()
