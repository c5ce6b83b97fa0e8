"""What one run writes to, and what watches over it, in one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from corl_jax.runs.directory import RunDir
from corl_jax.runs.guards import Guards
from corl_jax.runs.log import RunLog
from corl_jax.runs.saving import Saver
from corl_jax.runs.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the results of a run go, and what watches over it."""

    directory: RunDir
    log: RunLog
    guards: Guards
    saver: Saver
    watchdog: Watchdog
    fingerprint: Callable[[], Mapping[str, str]]  # option -> that of weights not in checkpoints
    began: float  # time.perf_counter() of the start, moved as if nothing had interrupted the run
    primary: bool = True
