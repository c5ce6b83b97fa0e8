"""Watches the numbers of a run: skipped updates, failing rewards, and alarms over logged metrics.

The caller says which metrics an alarm compares. The state is plain JSON and is saved with
checkpoints, so a resumed run continues all counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from corl_jax.errors import GuardError, RewardError

WINDOW = 10  # logged steps: over which fractions are averaged, and after which an alarm ends
FAILED_WINDOW = 20  # steps over which the failures of a reward are averaged
UNREWARDED_STEPS = 20  # first steps of a run, all without any reward, after which the run ends
HELD_OUT = "held_out"
HELD_OUT_HINT = "the reward is learned, not what it stands for"


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One alarm over logged metrics."""

    name: str
    keys: tuple[str, ...]  # the metrics that are compared with the limit
    hint: str  # what a value beyond the limit may mean
    limit: float = math.nan  # set from the options of a run
    above: bool = True  # True: alarm if the value is above the limit; False: if below
    span: int = 1  # number of logged steps whose mean is compared
    relative: bool = False  # compare with the mean of the first WINDOW logged steps
    # True: NaN means that there was nothing to measure, and is left out of the mean.
    # False: NaN is beyond every limit.
    nan_is_absent: bool = False
    # Further metrics, as a regex of the whole name. Each alarms if it is 1 in all WINDOW steps.
    always_one: re.Pattern[str] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that end a run, beside the alarms."""

    max_skipped_updates: int = 3  # in a row
    max_failed_fraction: float = 0.5  # of the samples of FAILED_WINDOW steps, for each reward
    end_unrewarded: bool = True  # end a run in which no reward ever applies
    held_out: float | None = 3.0  # standard errors that a held-out score may fall; None: any
    fatal: tuple[str, ...] = ()  # names of alarms that end the run


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of the parameters."""

    skipped: bool
    # Only an error message reads the others, so they may still be scalars of the device.
    loss: Any
    grad_norm: Any
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the loss, by name


@dataclasses.dataclass
class State:
    """The memory of the guards: JSON values, in which NaN may become None."""

    in_a_row: int = 0  # skipped updates up to now
    skipped: int = 0  # updates skipped in the whole run
    unlogged: int = 0  # updates skipped since the last logged step
    failed: dict[str, list] = dataclasses.field(default_factory=dict)
    """reward -> fractions of samples that it failed on, of the last FAILED_WINDOW steps"""
    unrewarded: int | None = 0  # first steps in which no reward applied; None after one that did
    recent: dict[str, list] = dataclasses.field(default_factory=dict)
    """metric -> its last `alarm.span` values"""
    first: dict[str, list] = dataclasses.field(default_factory=dict)
    """metric -> its first WINDOW values"""
    quiet: dict[str, int] = dataclasses.field(default_factory=dict)
    """alarm that is on -> logged steps within the limit since"""
    progress: dict[str, list] = dataclasses.field(default_factory=dict)
    """training reward -> its sum and number since the last evaluation"""
    best: dict[str, list] = dataclasses.field(default_factory=dict)
    """held-out score -> [mean, standard error, training reward] at its best evaluation"""


class Guards:
    """Ends a run that goes wrong, and raises alarms; all processes see the same numbers."""

    def __init__(
        self, limits: Limits, alarms: Sequence[Alarm] = (), progress: Sequence[str] = ()
    ) -> None:
        """`progress`: logged metrics whose mean should rise, with which held-out scores compare."""
        self._limits, self._alarms, self._progress = limits, tuple(alarms), tuple(progress)
        self._state = State()

    @property
    def skipped(self) -> int:
        """Number of skipped updates of the whole run."""
        return self._state.skipped

    def get_state(self) -> dict[str, Any]:
        """Returns what `restore` takes, as JSON values."""
        return dataclasses.asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state."""
        # A state of an older version may lack fields: they keep their defaults. Its progress is
        # that of the only metric.
        progress = state.get("progress", {})
        if not isinstance(progress, Mapping):
            progress = dict.fromkeys(self._progress[:1], progress)
        self._state = dataclasses.replace(State(), **{**state, "progress": dict(progress)})
        # An alarm that is on begins anew if it has become fatal, because only its beginning ends
        # a run.
        quiet = self._state.quiet.items()
        self._state.quiet = {k: v for k, v in quiet if k not in self._limits.fatal}

    # ---- every step

    def check_step(
        self,
        step: int,
        updates: Iterable[Update],
        failed: Mapping[str, float] | None = None,
        unrewarded: float | None = None,
        is_last: bool = False,
    ) -> None:
        """Checks the updates of a step, in order, and its rewards; `is_last`: of the run.

        `failed`: reward -> fraction of the samples that it failed on. `unrewarded`: fraction of
        the samples that no reward applies to; None in a run without rewards.

        Raises:
            GuardError: `max_skipped_updates` updates in a row were skipped, or no reward has
                applied to any completion of the run.
            RewardError: a reward fails on more than `max_failed_fraction` of the samples.
        """
        state = self._state
        for update in updates:
            state.in_a_row = state.in_a_row + 1 if update.skipped else 0
            state.skipped += update.skipped
            state.unlogged += update.skipped
            if state.in_a_row >= self._limits.max_skipped_updates:
                raise GuardError(_describe_skipped(step, update, state.in_a_row))
        for reward, fraction in (failed or {}).items():
            self._check_failures(step, reward, fraction)
        if unrewarded is not None and state.unrewarded is not None:
            self._check_unrewarded(step, unrewarded, is_last)

    def _check_unrewarded(self, step: int, fraction: float, is_last: bool) -> None:
        state = self._state
        state.unrewarded = (state.unrewarded or 0) + 1 if fraction == 1.0 else None
        if state.unrewarded is None or not self._limits.end_unrewarded:
            return
        if is_last or state.unrewarded >= UNREWARDED_STEPS:
            raise GuardError(
                f"step {step}: no reward has applied to any completion of the "
                f"{state.unrewarded} step(s) of this run, so it has learned nothing: every "
                "reward was None, NaN or infinite. Look at the columns that the rewards need, and "
                "at rewards by use; with guards.not_applicable null such a run continues"
            )

    def _check_failures(self, step: int, reward: str, fraction: float) -> None:
        last = self._state.failed.setdefault(reward, [])
        # In place: `last` is the list in the state.
        last[:] = [*last, fraction][-FAILED_WINDOW:]
        limit, mean = self._limits.max_failed_fraction, statistics.fmean(last)
        if len(last) == FAILED_WINDOW and mean > limit:
            raise RewardError(
                f"step {step}: reward {reward} failed on {mean:.0%} of the samples of the last "
                f"{len(last)} steps, more than guards.max_failed_reward_fraction {limit:g}; the "
                "warnings above say why"
            )

    # ---- logged steps

    def check_logged(
        self, step: int, values: Mapping[str, float], is_last: bool = False
    ) -> tuple[dict[str, float], list[str]]:
        """Returns (metrics to log with a step's others, a line for each alarm that begins).

        `is_last`: of the run, which may be shorter than the steps that alarms are averaged over.
        Call `require_none_fatal` with the lines after they are printed.
        """
        state = self._state
        metrics = {"update/skipped": float(state.unlogged)}
        metrics["update/skipped_total"] = float(state.skipped)
        state.unlogged = 0
        self._add_progress(values)
        lines = []
        for alarm in self._alarms:
            present = [key for key in alarm.keys if key in values]
            if not present:
                continue
            levels = {key: self._compute_level(alarm, key, values[key]) for key in present}
            over = [key for key, level in levels.items() if _is_beyond(alarm, level)]
            for key in self._find_always_one(alarm, values, is_last):
                levels[key] = 1.0
                over.append(key)
            if self._switch(alarm.name, bool(over)):
                side = "above" if alarm.above else "below"
                share = " of its first steps" if alarm.relative else ""
                what = " and ".join(f"{key} {levels[key]:.4g}{share}" for key in over)
                what = f"{what}, {side} {alarm.limit:g}"
                lines.append(_describe_alarm(alarm.name, step, what, alarm.hint))
            metrics[f"alarm/{alarm.name}"] = float(alarm.name in state.quiet)
        return metrics, lines

    def _add_progress(self, values: Mapping[str, float]) -> None:
        for name in self._progress:
            value = values.get(name, math.nan)
            if math.isfinite(value):
                total, count = self._state.progress.get(name, [0.0, 0])
                self._state.progress[name] = [total + value, count + 1]
                _add_first(self._state.first, name, value)

    def _take_progress(self) -> float | None:
        """Returns the mean training reward since the last call; None if a metric has no value."""
        progress, self._state.progress = self._state.progress, {}
        if not self._progress or any(name not in progress for name in self._progress):
            return None
        # The mean of means: tasks that take turns need not have as many steps each.
        sums = [progress[name] for name in self._progress]
        return statistics.fmean(total / count for total, count in sums)

    def _average_first(self) -> float | None:
        """Returns the mean training reward of the run's first WINDOW steps."""
        first = [self._state.first.get(name, []) for name in self._progress]
        if not all(first) or not first:
            return None
        return statistics.fmean(statistics.fmean(map(_to_number, values)) for values in first)

    def _find_always_one(
        self, alarm: Alarm, values: Mapping[str, float], is_last: bool
    ) -> list[str]:
        """Returns the metrics that were 1 in the last WINDOW logged steps, or in a shorter run."""
        # A limit for the mean would not do: a reward may be meant for few rows.
        stuck = []
        for key in filter(alarm.always_one.fullmatch, values) if alarm.always_one else ():
            recent = _add_recent(self._state.recent, key, values[key], WINDOW)
            if (len(recent) == WINDOW or is_last) and min(recent) == 1.0:
                stuck.append(key)
        return stuck

    def _compute_level(self, alarm: Alarm, key: str, value: float) -> float | None:
        """Returns what is compared with the limit; None after too few steps."""
        if alarm.span == 1:
            return value
        if alarm.nan_is_absent and math.isnan(value):
            return None
        first = self._state.first
        # The first WINDOW steps are the measure for later ones, so they raise no alarm.
        if alarm.relative and len(first.get(key, [])) < WINDOW:
            _add_first(first, key, value)
            return None
        recent = _add_recent(self._state.recent, key, value, alarm.span)
        if len(recent) < alarm.span:
            return None
        level = statistics.fmean(recent)
        if not alarm.relative:
            return level
        start = statistics.fmean(map(_to_number, first[key]))
        return level / start if start else 1.0

    def _switch(self, name: str, over: bool) -> bool:
        """Returns whether the alarm begins now."""
        # It ends after WINDOW logged steps within the limit, so that a value near the limit does
        # not raise it again and again.
        quiet = self._state.quiet
        if over:
            begins = name not in quiet
            quiet[name] = 0
            return begins
        if name in quiet:
            quiet[name] += 1
            if quiet[name] >= WINDOW:
                del quiet[name]
        return False

    # ---- evaluations

    def check_evaluation(
        self, step: int, scores: Mapping[str, tuple[float, float]]
    ) -> tuple[dict[str, float], list[str]]:
        """Raises an alarm if a held-out score falls although training rewards have risen.

        `scores`: name -> (mean, standard error); scores that are not finite are left out. The
        limit is `held_out` standard errors of the difference to its best value. Returns as
        `check_logged`.
        """
        state, limit = self._state, self._limits.held_out
        # The training reward of an evaluation is the mean of the logged steps since the one
        # before. For the first evaluation it is that of the run's first WINDOW logged steps.
        reward = self._take_progress()
        finite = {name: pair for name, pair in scores.items() if all(map(math.isfinite, pair))}
        if limit is None or not finite:
            return {}, []
        fallen = []
        for name, (mean, error) in finite.items():
            best = state.best.get(name)
            if best is None or mean > best[0]:
                state.best[name] = [mean, error, reward]
                continue
            then = best[2] if best[2] is not None else self._average_first()
            drop = best[0] - mean
            risen = then is not None and reward is not None and reward > then
            # Both scores are measured: the error of a difference is the root of the summed squares.
            if risen and drop > limit * math.hypot(error, best[1]):
                fallen.append(
                    f"{name} {mean:.4g} after {best[0]:.4g}, the reward {reward:.4g} after "
                    f"{then:.4g}"
                )
        begins = bool(fallen) and HELD_OUT not in state.quiet
        state.quiet.pop(HELD_OUT, None)
        if fallen:
            state.quiet[HELD_OUT] = 0
        line = _describe_alarm(HELD_OUT, step, " and ".join(fallen), HELD_OUT_HINT)
        return {f"alarm/{HELD_OUT}": float(bool(fallen))}, [line] if begins else []

    def require_none_fatal(self, lines: Sequence[str]) -> None:
        """Raises GuardError if one of the alarms that began is listed as fatal."""
        fatal = tuple(f"alarm {name} " for name in self._limits.fatal)
        fatal_lines = [line for line in lines if line.startswith(fatal)]
        if fatal and fatal_lines:
            raise GuardError("\n".join(f"{line}; guards.fatal lists it" for line in fatal_lines))


def _add_recent(windows: dict[str, list], key: str, value: float, span: int) -> list[float]:
    """Adds a value to the last `span` ones of a metric; returns them."""
    windows[key] = [*map(_to_number, windows.get(key, [])), value][-span:]
    return windows[key]


def _add_first(windows: dict[str, list], key: str, value: float) -> None:
    """Adds a value to the first WINDOW ones of a metric; later values are left out."""
    windows[key] = [*map(_to_number, windows.get(key, [])), value][:WINDOW]


def _is_beyond(alarm: Alarm, level: float | None) -> bool:
    """Returns whether a level is beyond the alarm's limit: NaN is, None is not."""
    if level is None:
        return False
    # `not` around the comparison: every comparison with NaN is False, so NaN counts as beyond.
    return not (level <= alarm.limit if alarm.above else level >= alarm.limit)


def _describe_alarm(name: str, step: int, what: str, hint: str) -> str:
    return f"alarm {name} at step {step}: {what}: {hint}"


def _to_number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN


def _describe_skipped(step: int, update: Update, in_a_row: int) -> str:
    """Returns an error message that names what was not finite in the last skipped update."""
    parts = [name for name, value in update.parts.items() if not math.isfinite(float(value))]
    where = ", ".join(parts) or "no part of the loss, so it is a derivative"
    return (
        f"step {step}: {in_a_row} update(s) in a row were skipped, because loss "
        f"{float(update.loss):g} and gradient norm {float(update.grad_norm):g} are not both "
        f"finite; not finite: {where}. Parameters and optimizer are finite, in checkpoints too. "
        "Try a lower optimizer.learning_rate or max_grad_norm, or model.dtype float32"
    )
