"""Defines evaluation suites: their inputs and their reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from corl_jax.data.dataset import Loader, Source
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.samples import Policy, Samples
from corl_jax.runs.pictures import Page
from corl_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of a suite."""

    policy: Policy
    # One pass is read of a Loader, whose passes never end.
    batches: Loader | Iterable[Prompts]
    sampling: SamplingOptions
    seed: int  # a sample depends on it and on the number of its row
    greedy_texts: bool = True  # the most likely token at each step
    greedy_images: bool = False
    rows: int | None = None  # only rows with a number below it count; None: all
    place: Callable[[Any], Any] = lambda tree: tree  # puts host arrays on the devices
    gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows  # all-gathers over processes
    # Samples prompts as in training and returns `TASK/NAME` -> rewards [prompts * group size].
    score: Callable[[Prompts], Mapping[str, np.ndarray]] | None = None
    # Scores samples by the rewards of `Suite.rewards`; returns reward -> values [samples].
    judge: Callable[[Samples], Mapping[str, np.ndarray]] | None = None


class Report(Protocol):
    """The result of a suite."""

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the run's log, `eval/NAME`."""
        ...

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns metric -> (mean, standard error) of the scores that should not fall."""
        ...

    def draw(self, title: str = "", max_images: int = 64, columns: int = 8) -> Page | None:
        """Returns a page of the first images; None if the suite shows none."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """A row of SUITES."""

    evaluate: Callable[[EvaluationInputs], Report]
    columns: tuple[str, ...] = ()  # that the data must have
    tasks: tuple[str, ...] = ()  # that are sampled; empty: the tasks of the run
    uses_rewards: bool = False  # scores the rewards of the config
    # Registered rewards that the suite asks, with their options, whatever the config trains on.
    rewards: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # (columns, names of the rows) -> what is wrong with values that scores are computed from
    find_row_problems: Callable[[Mapping[str, Sequence], Sequence[str]], list[str]] | None = None
    # (path, columns that the rows must have) -> data source; None: rows as training reads them
    open_rows: Callable[[str, Sequence[str]], Source] | None = None
    # (number of rows, seed, world) -> data source; None: needs a run, not for the command
    make_rows: Callable[[int, int, str], Any] | None = None
