"""Collects the files, the log and the guards of one run in one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from corl_jax.runs.directory import RunDir
from corl_jax.runs.guards import Guards
from corl_jax.runs.log import RunLog
from corl_jax.runs.saving import Saver
from corl_jax.runs.watchdog import Watchdog


@dataclasses.dataclass
class Progress:
    """Counts of the whole run, which are saved with its checkpoints."""

    num_tokens: int = 0  # of prompts and completions


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The places for the results of a run, and its guards."""

    directory: RunDir
    log: RunLog
    guards: Guards
    saver: Saver
    watchdog: Watchdog
    fingerprint: Callable[[], Mapping[str, str]]  # option -> hash of weights not in checkpoints
    sources: str  # stamp of the files of weights that the run was built from
    began: float  # time.perf_counter() of the start, moved as if nothing had interrupted the run
    primary: bool = True
    progress: Progress = dataclasses.field(default_factory=Progress)
