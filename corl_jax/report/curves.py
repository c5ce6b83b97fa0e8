"""Draws the metrics of runs over steps, and measures phases and the gap of reward and accuracy."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from markupsafe import Markup

from corl_jax.estimates import Z_95, Estimate
from corl_jax.report.charts import Line, draw_lines, draw_parts, draw_path, smooth
from corl_jax.report.labels import describe_metric
from corl_jax.report.read import EVALUATION, Points, RunRecord
from corl_jax.tasks import TASKS, image_tasks, text_tasks

ACCURACY = {**dict.fromkeys(image_tasks(tuple(TASKS)), "eval/draw/accuracy"),
            **dict.fromkeys(text_tasks(tuple(TASKS)), "eval/answer/accuracy")}  # fmt: skip
"""Task -> the metric of an evaluation that tells whether its completions are truly right."""
HEALTH = (
    "entropy", "kl", "completions/mean_length", "frac_reward_zero_std", "duplicate_fraction",
    "group_difference", "reward_std", "grad_norm", "learning_rate", "step_time",
)  # fmt: skip
"""Ends of the names of metrics that show whether a training is healthy."""
HEADLINE = "/accuracy"
"""Metrics of an evaluation that end so are its headline, if there are any."""
MAX_HEADLINE = 8
SMOOTHED_POINTS, WINDOWS = 60, 20  # longer lines are smoothed by a window of a twentieth
COMPILE, STEP = "phase/compile_seconds", "step_time"


@dataclasses.dataclass(frozen=True)
class Phases:
    """Where the time of a step goes."""

    step_seconds: float  # median over the log's lines, so that compilation does not count
    bar: Markup
    rates: list[tuple[str, str]]  # name, value


@dataclasses.dataclass(frozen=True)
class GapStep:
    """Reward of the training and accuracy of the evaluation at a step."""

    step: int
    reward: float
    accuracy: Estimate


@dataclasses.dataclass(frozen=True)
class Gap:
    """Whether accuracy follows the reward in a task."""

    task: str
    chart: Markup
    runs: list[tuple[str, list[GapStep]]]


def is_training(name: str) -> bool:
    """Returns whether a metric is the reward or the loss that a training is about."""
    last = name.rpartition("/")[2]
    return last == "reward" or last == "nll" or ("/rewards/" in name and last == "mean")


def draw_training(records: Sequence[RunRecord]) -> list[str]:
    """Draws every reward over steps; without rewards the losses."""
    names = _list_metrics(records)
    shown = [name for name in names if is_training(name) and not name.startswith(EVALUATION)]
    # The sum first: reward, t2i/reward, then its parts.
    tasks = list(TASKS)

    def rank(name: str) -> tuple[int, int]:
        task = name.partition("/")[0]
        return name.count("/"), tasks.index(task) if task in tasks else -1

    shown.sort(key=rank)
    if not any(name.endswith("reward") for name in shown):
        shown = [*(name for name in names if name == "loss" or name.startswith("vq/")), *shown]
    return [draw_metric(records, name) for name in shown]


def draw_health(records: Sequence[RunRecord]) -> list[str]:
    """Draws entropy, lengths, gradient norm and the like over steps."""
    names = [
        name
        for name in _list_metrics(records)
        if any(name == end or name.endswith(f"/{end}") for end in HEALTH)
    ]
    return [draw_metric(records, name) for name in names]


def draw_metric(records: Sequence[RunRecord], name: str) -> str:
    """Draws a metric of each run, rewards with their intervals.

    Long lines are smoothed; the values stand behind them instead of the intervals.
    """
    lines = []
    for record in records:
        points = record.read_points(name)
        if len(points) > SMOOTHED_POINTS:
            window = len(points) // WINDOWS
            lines.append(Line(record.name, smooth(points, window), faint=points))
        else:
            lines.append(Line(record.name, points, estimate_band(record, name)))
    return draw_lines(describe_metric(name), lines)


def estimate_band(record: RunRecord, name: str) -> list[tuple[int, float, float]]:
    """Returns (step, low, high) of the 95% intervals of a reward's means; [] for other metrics.

    The completions of a prompt count as one observation, as if they were equal. They are not, so
    the intervals are rather too wide.
    """
    prompts = record.get_option("train", "prompts_per_step")
    # reward -> reward_std, TASK/reward -> TASK/reward_std, TASK/rewards/NAME/mean -> .../std
    spread = f"{name.removesuffix('mean')}std" if name.endswith("/mean") else f"{name}_std"
    spreads = dict(record.read_points(spread)) if is_training(name) else {}
    if not isinstance(prompts, int) or prompts < 1:
        return []
    return [
        (step, mean - half, mean + half)
        for step, mean in record.read_points(name)
        if (half := Z_95 * spreads.get(step, math.nan) / math.sqrt(prompts)) >= 0
    ]


def draw_evaluations(records: Sequence[RunRecord], headline: bool) -> list[str]:
    """Draws the metrics of evaluations with their 95% intervals: the headline, or all others."""
    names = list_estimated_metrics(records)
    chosen = choose_headline(names)
    return [draw_estimates(records, name) for name in names if (name in chosen) == headline]


def list_estimated_metrics(records: Sequence[RunRecord]) -> list[str]:
    """Returns the metrics of evaluations that have an interval or a standard error."""
    names: dict[str, None] = {}
    for record in records:
        for line in record.evaluations:
            names.update(dict.fromkeys(
                name for name in line
                if name.startswith(EVALUATION)
                and (f"{name}_low" in line or f"{name}_stderr" in line)
            ))  # fmt: skip
    return list(names)


def choose_headline(names: Sequence[str]) -> list[str]:
    """Returns the metrics that sum up an evaluation."""
    return [name for name in names if name.endswith(HEADLINE)] or list(names[:MAX_HEADLINE])


def draw_estimates(records: Sequence[RunRecord], name: str) -> str:
    """Draws a metric of evaluations over steps with its 95% interval."""
    lines, is_rate = [], False
    for record in records:
        estimates = record.read_estimates(name)
        is_rate = is_rate or any(value.is_rate for _, value in estimates)
        points = [(step, value.mean) for step, value in estimates]
        band = [(step, value.low, value.high) for step, value in estimates]
        lines.append(Line(record.name, points, band, has_dots=True))
    return draw_lines(describe_metric(name), lines, is_rate)


def _list_metrics(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.list_metrics()))


# ---- reward against accuracy


def list_gaps(records: Sequence[RunRecord]) -> list[Gap]:
    """Returns reward and accuracy of each task that has both."""
    gaps = []
    for task, name in ACCURACY.items():
        runs = [(record.name, pair_steps(record, f"{task}/reward", name)) for record in records]
        runs = [(run, steps if len(steps) > 1 else []) for run, steps in runs]
        if not any(steps for _, steps in runs):
            continue
        paths = [
            (run, [(step.step, step.reward, step.accuracy.mean) for step in steps])
            for run, steps in runs
        ]
        description = TASKS[task].description
        chart = draw_path(
            f"Reward and accuracy: {description}", paths, "reward in training",
            "accuracy on held-out rows",
        )  # fmt: skip
        gaps.append(Gap(description, Markup(chart), runs))
    return gaps


def pair_steps(record: RunRecord, reward: str, accuracy: str) -> list[GapStep]:
    """Returns reward and accuracy at the steps of evaluations, but for those before any reward.

    The reward is that of the newest line of the log up to the evaluation. At step 0 it is that of
    the first line, if one follows before the next evaluation.
    """
    rewards, estimates = record.read_points(reward), record.read_estimates(accuracy)
    steps = []
    for at, (step, estimate) in enumerate(estimates):
        following = estimates[at + 1][0] if at + 1 < len(estimates) else step
        value = _find_reward(rewards, step, following)
        if value is not None:
            steps.append(GapStep(step, value, estimate))
    return steps


def _find_reward(rewards: Points, step: int, following: int) -> float | None:
    before = [value for at, value in rewards if at <= step]
    if before:
        return before[-1]
    after = [value for at, value in rewards if at < following]
    return after[0] if after else None


# ---- where the time goes


def measure_phases(record: RunRecord) -> Phases | None:
    """Returns the phases of a step and the throughput; None without times in the log."""
    steps = record.read_points(STEP)
    if not steps:
        return None
    step_seconds = statistics.median(value for _, value in steps)
    names = [
        name
        for name in record.list_metrics()
        if name.startswith("phase/") and name != COMPILE  # which is a part of the others
    ]
    medians = {name: statistics.median(v for _, v in record.read_points(name)) for name in names}
    parts = [(describe_metric(name), value) for name, value in medians.items() if value > 0]
    # Reading data, checks and the log. Medians do not add up exactly.
    if (rest := step_seconds - sum(medians.values())) > 0.005 * step_seconds:
        parts.append(("other", rest))
    bar = draw_parts(parts, lambda seconds: f"{seconds:.3g} s")
    rates = [
        (describe_metric(name), f"{statistics.median(v for _, v in record.read_points(name)):,.4g}")
        for name in record.list_metrics()
        if name.startswith("perf/")
    ]
    return Phases(step_seconds, Markup(bar), rates)
