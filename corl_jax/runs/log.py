"""Numbers of a run, for machines and for eyes: JSON lines, TensorBoard, the console.

Only the first process writes. A resumed run continues its files as if it had never stopped:
what was logged after the restored step is dropped from `metrics.jsonl` and hidden in TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from corl_jax.atomic_files import replace_file
from corl_jax.runs.append_log import Records
from corl_jax.runs.directory import RunDir, jsonable
from corl_jax.runs.pace import Pace
from corl_jax.runs.tensorboard import Board

HEADLINE = (
    "loss", "reward", "t2i/reward", "mm2t/reward", "t2i/nll", "mm2t/nll", "kl", "t2i/kl",
    "mm2t/kl", "grad_norm",
    "eval/draw/accuracy", "eval/answer/accuracy",
)  # fmt: skip
"""What the console shows of a step, as far as it is there; a step without any is shown whole."""


class Metrics:
    """Writes each logged step to every sink; without `primary` it does nothing."""

    def __init__(
        self,
        run: RunDir,
        resumed_at: int | None = None,
        total_steps: int | None = None,
        primary: bool = True,
        stream: TextIO | None = None,
        resumed_lines: int | None = None,
    ):
        """`resumed_at`: the restored step, None for a run from its beginning.

        `resumed_lines`: how many lines had been logged when that step was saved.

        Raises:
            InputError: tensorboardX is not installed.
        """
        self.primary, self.pace = primary, Pace()
        self._failing: set[str] = set()
        self._announced: set[str] = set()
        if not primary:
            return
        self._console = Console(resumed_at or 0, total_steps, stream or sys.stderr, self.pace)
        self._lines = JsonLines(run.metrics, resumed_at, resumed_lines)
        self._board = Board(run.tensorboard, resumed_at)
        with self.bearing("tensorboard"):
            self._board.start()

    @property
    def lines(self) -> int:
        """Lines of `metrics.jsonl` so far, with those that wait for a disk with room."""
        return self._lines.count if self.primary else 0

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Scalars after `step` steps (a batch with all its updates); infinite and NaN become null.

        TensorBoard has no null: NaN, which says "does not apply", is left out there.
        """
        if not self.primary:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with self.bearing("metrics.jsonl"):
            self._lines.write(step, numbers)
        with self.bearing("tensorboard"):
            self._board.scalars(step, numbers)
        with _console_may_fail():
            self._console.step(step, numbers)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture [H, W, 3] uint8, for TensorBoard."""
        if self.primary:
            with self.bearing("tensorboard"):
                self._board.image(step, name, pixels)

    def text(self, step: int, name: str, markdown: str) -> None:
        """A text or table in markdown, for TensorBoard."""
        if self.primary:
            with self.bearing("tensorboard"):
                self._board.text(step, name, markdown)

    def say(self, message: str) -> None:
        """A line on the console, above the progress bar where there is one."""
        if self.primary:
            with _console_may_fail():
                self._console.say(message)

    def announce_compilation(self, what: str) -> None:
        """Says once that the first `what` takes longer than later ones."""
        if what not in self._announced:
            self._announced.add(what)
            self.say(f"compiling for the first {what} ...")

    @contextlib.contextmanager
    def bearing(self, what: str) -> Iterator[None]:
        """Bears an OSError of the block, as of a full disk: training is worth more than its log.

        Said when writing `what` begins to fail, and when it works again.
        """
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self._failing.add(what)
                self.say(
                    f"warning: {what}: cannot be written ({error.strerror or error}); training "
                    "goes on and tries again"
                )
            return
        if what in self._failing:
            self._failing.discard(what)
            self.say(f"{what}: can be written again")

    def close(self) -> None:
        """Ends the bar and closes all files, each whatever becomes of the others."""
        if not self.primary:
            return
        with contextlib.ExitStack() as ends:
            ends.callback(self._close_console)
            ends.callback(self._close_records, "tensorboard", self._board.records)
            ends.callback(self._close_records, "metrics.jsonl", self._lines.records)

    def _close_records(self, what: str, records: Records) -> None:
        with self.bearing(what):
            records.close()
        if lost := records.waiting + records.lost:
            self.say(f"warning: {what}: {lost} record(s) were lost, for which there was no room")

    def _close_console(self) -> None:
        with _console_may_fail():
            self._console.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JsonLines:
    """`metrics.jsonl`: an object with `step` and the metrics per line, in order of steps."""

    def __init__(self, path: Path, resumed_at: int | None, resumed_lines: int | None = None):
        """Drops the lines of later steps, and the half one that a killed process leaves.

        Of the restored step itself those too that came after its checkpoint.
        """
        limit = math.inf if resumed_lines is None else resumed_lines
        self.count = 0
        with replace_file(path) as kept:
            for line, record in read_lines(path):
                if resumed_at is not None and record["step"] <= resumed_at and self.count < limit:
                    kept.write(line)
                    self.count += 1
        self.records = Records(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Raises OSError if the line has to wait for the next one."""
        record = jsonable({"step": int(step), **numbers})
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = self.records.lost
        try:
            self.records.add(line)  # unbuffered: a kill loses no finished line
        finally:
            self.count += self.records.lost == before


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of every whole line of a metrics file, none if there is no file."""
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


def _headline(name: str, number: float) -> str:
    # NaN would look like an overflow where no reward applied to anything.
    absent = math.isnan(number) and name.endswith("reward")
    return f"{name} none" if absent else f"{name} {number:.4g}"


def _console_may_fail() -> contextlib.suppress:
    """For a console that is a file on a full disk: there is nowhere else to tell of it."""
    return contextlib.suppress(OSError)


class Console:
    """A progress bar on a terminal, a line per step elsewhere."""

    def __init__(self, first_step: int, total_steps: int | None, stream: TextIO, pace: Pace):
        self._stream, self._total, self._pace = stream, total_steps, pace
        self._last: tuple[int, float] | None = None  # step and time of the newest log of a step
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first_step, file=stream, unit="step", dynamic_ncols=True,
                # Without tqdm's own time left, whose mean has compilation and evaluations in it.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )  # fmt: skip

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        shown = {name: numbers[name] for name in HEADLINE if name in numbers}
        texts = [_headline(name, number) for name, number in (shown or numbers).items()]
        if not any(name.startswith("eval/") for name in numbers):
            compiling = numbers.get("phase/compile_seconds", 0.0)
            self._note_pace(step, numbers.get("step_time"), compiling)
        texts += self._pace_texts(step)
        if self._bar is None:
            self.say("  ".join([self._position(step), *texts]))
            return
        if shown:
            self._bar.set_postfix_str("  ".join(texts), refresh=False)
        else:  # an evaluation, which should stay on the screen
            self.say("  ".join([self._position(step), *texts]))
        self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        if self._bar is None:
            print(message, file=self._stream, flush=True)
        else:
            self._bar.write(message, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _position(self, step: int) -> str:
        return f"step {step}" if self._total is None else f"step {step}/{self._total}"

    def _note_pace(self, step: int, seconds: float | None, compiling: float) -> None:
        """Notes how long a step took: `seconds` if it was measured, else the time between logs."""
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if seconds is None and last is not None and step > last[0]:
            seconds = (now - last[1]) / (step - last[0])
        self._pace.add_step(seconds, compiling)

    def _pace_texts(self, step: int) -> list[str]:
        """Seconds a step, and to the end of the run; nothing while all steps compile."""
        if self._pace.seconds_per_step is None:
            return []
        texts = [f"{self._pace.seconds_per_step:.3g} s/step"]
        if self._total is not None:
            left = int(self._pace.seconds_left(step, self._total) or 0)
            texts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return texts


class Phases:
    """Adds up seconds by phase: `with phases("rollout"): ...`.

    Times are of the host; a block that ends before the device has finished counts too little.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def take(self) -> dict[str, float]:
        """`phase/NAME_seconds` since the last take."""
        seconds, self._seconds = self._seconds, {}
        return {f"phase/{name}_seconds": spent for name, spent in seconds.items()}
