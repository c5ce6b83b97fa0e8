"""Logs the numbers of a run: to JSON lines, the console, TensorBoard and other trackers.

Only the first process writes. A resumed run continues its files as if it had never stopped:
what was logged after the restored step is dropped from `metrics.jsonl` and hidden in TensorBoard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from corl_jax.devices import processes
from corl_jax.metrics import Metric
from corl_jax.runs.append_log import AppendLog
from corl_jax.runs.directory import RunDir
from corl_jax.runs.guards import Guards
from corl_jax.runs.json_lines import JsonLines
from corl_jax.runs.pace import (
    COMPILE_SECONDS,
    COMPILING,
    STEP_SECONDS,
    Pace,
    StepClock,
)
from corl_jax.runs.tensorboard import EventFile, Layout
from corl_jax.runs.terminal import Console
from corl_jax.runs.trackers import (
    TENSORBOARD,
    TRACKERS,
    Description,
    Tracker,
    read_run_id,
)

REDUCTIONS = {"mean": np.mean, "sum": np.sum, "max": np.max}
"""How the numbers of all processes become one."""


def reduce_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Returns the metrics as numbers, reduced over all processes. All processes must call it."""
    # float() waits for the device.
    values = {name: float(metric) for name, metric in metrics.items()}
    for over, reduction in REDUCTIONS.items():
        names = [name for name, metric in metrics.items() if metric.over == over]
        if names:
            # One gather for each reduction, not for each metric: every gather is a collective.
            rows = processes.all_gather(np.array([values[name] for name in names], np.float32))
            values |= dict(zip(names, reduction(rows, axis=0).tolist(), strict=True))
    return values


@dataclasses.dataclass
class StepLog:
    """Checks and times each step of a run; logs every `every`-th one and the last.

    A result is what a step returned; only the functions given here look into it.
    """

    log: RunLog
    guards: Guards
    clock: StepClock
    every: int
    last_step: int  # of the run
    check: Callable[[int, Any], None]  # (step, result); called after each step
    # (step, result, seconds by metric) -> all numbers to log, but for those of the guards
    describe: Callable[[int, Any, dict[str, float]], dict[str, float]]
    # (step, result) -> whether it took time; called after each step, for what is not a number
    show: Callable[[int, Any], bool]
    _unlogged: list[dict[str, float]] = dataclasses.field(default_factory=list)
    _is_first: bool = True  # of this process

    def begin(self) -> None:
        """Announces the first step, which compiles, and starts its time."""
        self.log.announce_compilation("step")
        self.clock.restart()

    def add(self, step: int, result: Any) -> None:
        """Logs a result, with which `step` steps of the run are done.

        Raises:
            GuardError, RewardError: the run must not continue, nor be saved as it is.
        """
        # The check waits for the device, so the time is taken after it: it includes the update.
        self.check(step, result)
        seconds = self.clock.take()
        if self._is_first:
            self._report_first(seconds)
        self._unlogged.append(seconds)
        if step % self.every and step != self.last_step:
            self._show(step, result)
            return
        means = {n: statistics.fmean(row[n] for row in self._unlogged) for n in seconds}
        self._unlogged.clear()
        values = self.describe(step, result, means)
        alarms, lines = self.guards.check_logged(step, values, step == self.last_step)
        self.log.add_metrics(step, values | alarms)
        # Shown before alarms are raised: a fatal one ends the run, and these values explain it.
        self._show(step, result)
        self.log.raise_alarms(self.guards, lines)

    def _show(self, step: int, result: Any) -> None:
        if self.show(step, result):
            self.clock.restart()  # the next step's time is without it

    def _report_first(self, seconds: Mapping[str, float]) -> None:
        """Prints how long the first step has compiled; its log line may come many steps later."""
        self._is_first = False
        whole, compiling = seconds[STEP_SECONDS], seconds.get(COMPILE_SECONDS, 0.0)
        if compiling > COMPILING * whole:
            self.log.say(f"first step: {whole:.1f} s, of which {compiling:.1f} s compiling")


class RunLog:
    """Writes each logged step to `metrics.jsonl`, the console, TensorBoard and other trackers.

    Without `primary` it does nothing.
    """

    def __init__(
        self,
        run: RunDir,
        resumed_at: int | None = None,
        total_steps: int | None = None,
        primary: bool = True,
        stream: TextIO | None = None,
        resumed_lines: int | None = None,
        *,
        headline: Mapping[str, str] | None = None,
        quiet: Sequence[str] = (),
        rename: Callable[[str], str] = str,
        trackers: Sequence[str] = (TENSORBOARD,),
        config: Mapping[str, Any] | None = None,
        pace: Pace | None = None,
    ):
        """`resumed_at`: the restored step; None for a run from its beginning.

        `resumed_lines`: how many lines had been logged when that step was saved.
        `headline`: the metrics that the console shows -> how it shows NaN. A line without any of
        them is shown whole. `quiet`: prefixes of metrics that TensorBoard shows only after the
        first value of the run that is not 0. `rename`: returns the name of a metric there.
        `trackers`: names of `TRACKERS` or `tensorboard`,
        which are told the `config`.

        Raises:
            InputError: tensorboardX is not installed.
        """
        self.primary, self.pace = primary, pace or Pace()
        self._failing: set[str] = set()
        self._announced: set[str] = set()
        self._quiet, self._rename = tuple(quiet), rename
        self.needs_layout = primary  # until `add_layout`
        if not primary:
            return
        self._console = Console(
            resumed_at or 0, total_steps, stream or sys.stderr, self.pace, headline or {}
        )
        self._lines = JsonLines(run.metrics, resumed_at, resumed_lines)
        self._trackers: dict[str, Tracker] = {}
        self._events = EventFile(run.tensorboard, resumed_at) if TENSORBOARD in trackers else None
        if self._events is not None:
            with self.tolerate_disk_errors(TENSORBOARD):
                self._events.start()
        self._open_trackers(
            run, [x for x in trackers if x != TENSORBOARD], resumed_at, config or {}
        )

    def _open_trackers(
        self, run: RunDir, names: Sequence[str], resumed_at: int | None, config: Mapping[str, Any]
    ) -> None:
        """Starts or continues the run in trackers; one that fails is left out, with a warning."""
        if not names:
            return
        with self.tolerate_disk_errors("trackers"):
            run_id = read_run_id(run.root, resumed_at is not None)
            description = Description(run.root.absolute().name, run.root, config, run_id)
            for name in names:
                with self._tolerate_tracker_errors(name):
                    self._trackers[name] = TRACKERS[name](description)

    @property
    def num_lines(self) -> int:
        """Number of lines of `metrics.jsonl`, those included that wait until a disk has room."""
        return self._lines.count if self.primary else 0

    @property
    def names(self) -> set[str]:
        """Names of all metrics that the run has logged, also in earlier processes."""
        return set(self._lines.peaks) if self.primary else set()

    def add_metrics(
        self, step: int, values: Mapping[str, Any], is_evaluation: bool = False
    ) -> None:
        """Logs numbers after `step` steps (a batch with all its updates).

        Infinite and NaN become null in JSON. TensorBoard has no null: NaN, which means "does not
        apply", is left out there.
        """
        if not self.primary:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with self.tolerate_disk_errors("metrics.jsonl"):
            self._lines.write(step, numbers)
        self._tell("add_scalars", step, self._choose_shown(numbers))
        with _tolerate_console_errors():
            self._console.add_metrics(step, numbers, is_evaluation)

    def _choose_shown(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Returns the numbers without the quiet ones that have been 0 in the whole run."""
        return {
            self._rename(name): number
            for name, number in numbers.items()
            if self._lines.peaks[name] or not name.startswith(self._quiet)
        }

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Logs an image [H, W, 3] uint8 to TensorBoard and other trackers."""
        self._tell("add_image", step, name, pixels)

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Logs a text or table in markdown to TensorBoard and other trackers."""
        self._tell("add_text", step, name, markdown)

    def add_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Logs a histogram to trackers: `counts` [bins] between `edges` [bins + 1]."""
        self._tell("add_histogram", step, name, counts, edges)

    def _tell(self, method: str, *arguments: Any) -> None:
        """Calls a method of TensorBoard's event file and of all other trackers."""
        if not self.primary:
            return
        if self._events is not None:
            with self.tolerate_disk_errors(TENSORBOARD):
                getattr(self._events, method)(*arguments)
        for name, tracker in self._trackers.items():
            with self._tolerate_tracker_errors(name):
                getattr(tracker, method)(*arguments)

    def add_layout(self, step: int, layout: Layout) -> None:
        """Logs which metrics TensorBoard shows together."""
        self.needs_layout = False
        if self.primary and self._events is not None:
            with self.tolerate_disk_errors(TENSORBOARD):
                self._events.add_layout(step, layout)

    def add_hparams(self, step: int, options: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Logs the options and the metrics by which TensorBoard compares runs."""
        if self.primary and self._events is not None:
            with self.tolerate_disk_errors(TENSORBOARD):
                self._events.add_hparams(step, options, metrics)

    def raise_alarms(self, guards: Guards, lines: Sequence[str]) -> None:
        """Prints the alarms that begin; raises GuardError if one of them is fatal."""
        for line in lines:
            self.say(line)
        guards.require_none_fatal(lines)

    def say(self, message: str) -> None:
        """Prints a line on the console, above the progress bar if there is one."""
        if self.primary:
            with _tolerate_console_errors():
                self._console.say(message)

    def announce_compilation(self, what: str) -> None:
        """Prints once that the first `what` compiles, so that it takes longer than later ones."""
        if what in self._announced:
            return
        # Whether the programs are in the cache is known only when they are asked for.
        note = "" if self._announced else "; seconds for programs in the cache, else up to minutes"
        self._announced.add(what)
        self.say(f"compiling for the first {what}{note} ...")

    @contextlib.contextmanager
    def tolerate_disk_errors(self, what: str, *others: type[Exception]) -> Iterator[None]:
        """Logs an OSError of the block once, for example a full disk, and continues.

        `others`: errors that are treated like it.

        Prints a line when writing `what` begins to fail, and when it works again.
        """
        # A run should not end because its log cannot be written.
        try:
            yield
        except (OSError, *others) as error:
            if what not in self._failing:
                self._failing.add(what)
                reason = getattr(error, "strerror", None) or error
                self.say(
                    f"warning: {what}: cannot be written ({reason}); training continues and "
                    "tries again"
                )
            return
        if what in self._failing:
            self._failing.discard(what)
            self.say(f"{what}: can be written again")

    @contextlib.contextmanager
    def _tolerate_tracker_errors(self, name: str) -> Iterator[None]:
        """Prints an error of a tracker's package once, and continues."""
        try:
            yield
        except Exception as error:  # of a network, an account, or the package itself
            if name not in self._failing:
                self._failing.add(name)
                text = str(error).strip() or type(error).__name__
                self.say(f"warning: {name}: {text}; training continues without what it has missed")

    def close(self) -> None:
        """Ends the bar and closes all files; one that fails does not keep the others open."""
        if not self.primary:
            return
        with contextlib.ExitStack() as ends:
            ends.callback(self._close_console)
            if self._events is not None:
                ends.callback(self._close_records, TENSORBOARD, self._events.records)
            for name in self._trackers:
                ends.callback(self._close_tracker, name)
            ends.callback(self._close_records, "metrics.jsonl", self._lines.records)

    def _close_records(self, what: str, records: AppendLog) -> None:
        with self.tolerate_disk_errors(what):
            records.close()
        if lost := records.waiting + records.lost:
            self.say(f"warning: {what}: {lost} record(s) are lost, because there was no room")

    def _close_tracker(self, name: str) -> None:
        with self._tolerate_tracker_errors(name):
            self._trackers[name].close()

    def _close_console(self) -> None:
        with _tolerate_console_errors():
            self._console.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tolerate_console_errors() -> contextlib.suppress:
    """Ignores an OSError of the console."""
    # The console may be a file on a full disk, and there is no other place to report to.
    return contextlib.suppress(OSError)
