"""Shows the steps of a run on the console: a progress bar, or lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TextIO

from corl_jax.runs.pace import EVALUATION, Pace


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units, as 1 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


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
