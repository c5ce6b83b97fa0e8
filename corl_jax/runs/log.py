"""Logs the numbers of a run: to JSON lines, TensorBoard and the console.

Only the first process writes. A resumed run continues its files as if it had never stopped:
what was logged after the restored step is dropped from `metrics.jsonl` and hidden in TensorBoard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from corl_jax.atomic_files import replace_file
from corl_jax.devices import processes
from corl_jax.metrics import Metric
from corl_jax.runs.append_log import AppendLog
from corl_jax.runs.directory import RunDir, to_json
from corl_jax.runs.guards import Guards
from corl_jax.runs.pace import (
    COMPILE_SECONDS,
    COMPILING,
    EVALUATION,
    STEP_SECONDS,
    Pace,
    StepClock,
)
from corl_jax.runs.tensorboard import EventFile

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
    show: Callable[[int, Any], None]  # (step, result); what is not a number
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
            return
        means = {n: statistics.fmean(row[n] for row in self._unlogged) for n in seconds}
        self._unlogged.clear()
        values = self.describe(step, result, means)
        alarms, lines = self.guards.check_logged(step, values, step == self.last_step)
        self.log.add_metrics(step, values | alarms)
        # Shown before alarms are raised: a fatal one ends the run, and these values explain it.
        self.show(step, result)
        self.log.raise_alarms(self.guards, lines)

    def _report_first(self, seconds: Mapping[str, float]) -> None:
        """Prints how long the first step has compiled; its log line may come many steps later."""
        self._is_first = False
        whole, compiling = seconds[STEP_SECONDS], seconds.get(COMPILE_SECONDS, 0.0)
        if compiling > COMPILING * whole:
            self.log.say(f"first step: {whole:.1f} s, of which {compiling:.1f} s compiling")


class RunLog:
    """Writes each logged step to `metrics.jsonl`, TensorBoard and the console.

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
        pace: Pace | None = None,
    ):
        """`resumed_at`: the restored step; None for a run from its beginning.

        `resumed_lines`: how many lines had been logged when that step was saved.
        `headline`: the metrics that the console shows -> how it shows NaN. A line without any of
        them is shown whole.

        Raises:
            InputError: tensorboardX is not installed.
        """
        self.primary, self.pace = primary, pace or Pace()
        self._failing: set[str] = set()
        self._announced: set[str] = set()
        if not primary:
            return
        self._console = Console(
            resumed_at or 0, total_steps, stream or sys.stderr, self.pace, headline or {}
        )
        self._lines = JsonLines(run.metrics, resumed_at, resumed_lines)
        self._events = EventFile(run.tensorboard, resumed_at)
        with self.tolerate_disk_errors("tensorboard"):
            self._events.start()

    @property
    def num_lines(self) -> int:
        """Number of lines of `metrics.jsonl`, those included that wait until a disk has room."""
        return self._lines.count if self.primary else 0

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
        with self.tolerate_disk_errors("tensorboard"):
            self._events.add_scalars(step, numbers)
        with _tolerate_console_errors():
            self._console.add_metrics(step, numbers, is_evaluation)

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Logs an image [H, W, 3] uint8 to TensorBoard."""
        if self.primary:
            with self.tolerate_disk_errors("tensorboard"):
                self._events.add_image(step, name, pixels)

    def add_text(self, step: int, name: str, markdown: str) -> None:
        """Logs a text or table in markdown to TensorBoard."""
        if self.primary:
            with self.tolerate_disk_errors("tensorboard"):
                self._events.add_text(step, name, markdown)

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
    def tolerate_disk_errors(self, what: str) -> Iterator[None]:
        """Logs an OSError of the block once, for example a full disk, and continues.

        Prints a line when writing `what` begins to fail, and when it works again.
        """
        # A run should not end because its log cannot be written.
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self._failing.add(what)
                self.say(
                    f"warning: {what}: cannot be written ({error.strerror or error}); training "
                    "continues and tries again"
                )
            return
        if what in self._failing:
            self._failing.discard(what)
            self.say(f"{what}: can be written again")

    def close(self) -> None:
        """Ends the bar and closes all files; one that fails does not keep the others open."""
        if not self.primary:
            return
        with contextlib.ExitStack() as ends:
            ends.callback(self._close_console)
            ends.callback(self._close_records, "tensorboard", self._events.records)
            ends.callback(self._close_records, "metrics.jsonl", self._lines.records)

    def _close_records(self, what: str, records: AppendLog) -> None:
        with self.tolerate_disk_errors(what):
            records.close()
        if lost := records.waiting + records.lost:
            self.say(f"warning: {what}: {lost} record(s) are lost, because there was no room")

    def _close_console(self) -> None:
        with _tolerate_console_errors():
            self._console.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JsonLines:
    """Writes `metrics.jsonl`: a line for each logged step, an object of `step` and the metrics."""

    def __init__(self, path: Path, resumed_at: int | None, resumed_lines: int | None = None):
        """Drops the lines that were logged after the checkpoint of step `resumed_at`.

        The half line that a killed process leaves is dropped too.
        """
        # Lines of the same step that came after the save, such as an evaluation, are logged again.
        limit = math.inf if resumed_lines is None else resumed_lines
        self.count = 0
        with replace_file(path) as file:
            for line, record in read_lines(path):
                if resumed_at is not None and record["step"] <= resumed_at and self.count < limit:
                    file.write(line)
                    self.count += 1
        self.records = AppendLog(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes a line.

        Raises:
            OSError: it could not be written now, and is written before the next one.
        """
        record = to_json({"step": int(step), **numbers})
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = self.records.lost
        try:
            self.records.add(line)  # unbuffered: a kill loses no finished line
        finally:
            # A record that waits counts: it is written later. A lost one does not.
            self.count += self.records.lost == before


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields (line, record) of every whole line of a metrics file; nothing without a file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line.rstrip(b"\n") + b"\n", record


def _tolerate_console_errors() -> contextlib.suppress:
    """Ignores an OSError of the console."""
    # The console may be a file on a full disk, and there is no other place to report to.
    return contextlib.suppress(OSError)


def format_duration(seconds: float) -> str:
    """Returns seconds as hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _format_metric(name: str, number: float, nan: str) -> str:
    return f"{name} {nan if math.isnan(number) else format(number, '.4g')}"


class Console:
    """Shows a progress bar on a terminal, and a line per step elsewhere."""

    def __init__(
        self,
        first_step: int,
        total_steps: int | None,
        stream: TextIO,
        pace: Pace,
        headline: Mapping[str, str],
    ):
        self._stream, self._total, self._pace = stream, total_steps, pace
        self._headline = headline
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first_step, file=stream, unit="step", dynamic_ncols=True,
                # Without tqdm's own time left, whose mean includes compilation and evaluations.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )  # fmt: skip

    def add_metrics(self, step: int, numbers: Mapping[str, float], is_evaluation: bool) -> None:
        """Shows the headline of a step; shows all metrics if the line has none of the headline."""
        shown = {name: numbers[name] for name in self._headline if name in numbers}
        # NaN would look like an overflow where a reward applies to nothing.
        absent = "none" if is_evaluation else "nan"
        texts = [
            _format_metric(name, number, self._headline.get(name, absent))
            for name, number in (shown or numbers).items()
        ]
        texts += self._describe_pace(step, EVALUATION if is_evaluation else "")
        line = "  ".join([self._describe_position(step), *texts])
        if self._bar is None:
            self.say(line)
            return
        if shown and not is_evaluation:
            self._bar.set_postfix_str("  ".join(texts), refresh=False)
        else:  # it stays on the screen
            self.say(line)
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Prints a line."""
        if self._bar is None:
            print(message, file=self._stream, flush=True)
        else:
            self._bar.write(message, file=self._stream)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _describe_position(self, step: int) -> str:
        return f"step {step}" if self._total is None else f"step {step}/{self._total}"

    def _describe_pace(self, step: int, after: str) -> list[str]:
        """Returns seconds per step and to the end of the run; nothing after the first step."""
        if self._pace.seconds_per_step is None:
            return []
        texts = [f"{self._pace.seconds_per_step:.3g} s/step"]
        if self._total is not None:
            left = self._pace.estimate_seconds_left(step, self._total, after=after)
            texts.append(f"{format_duration(left or 0)} left")
        return texts
