"""Says which metrics TensorBoard shows together, and by which options it compares runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from corl_jax.runs.tensorboard import Chart, Layout
from corl_jax.tasks import TASKS, list_segments

HPARAMS = (
    "seed", "stage", "model.path", "algorithm.name", "algorithm.tasks", "algorithm.advantages",
    "algorithm.mm2t_weight", "algorithm.kl_coef", "algorithm.num_iterations", "rollout.group_size",
    "rollout.temperature", "rollout.cfg_scale", "optimizer.name", "optimizer.learning_rate",
    "optimizer.schedule", "train.prompts_per_step", "lora.rank",
)  # fmt: skip
"""Options in TensorBoard's table of runs."""
HPARAM_METRICS = ("reward", "loss", "eval/draw/accuracy", "eval/answer/accuracy")
"""Metrics in TensorBoard's table of runs."""

_SEGMENT = f"({'|'.join(list_segments())})"
HEALTH = {
    "KL divergence from the reference": f"{_SEGMENT}/kl",
    "entropy": f"{_SEGMENT}/entropy",
    "clipped tokens": f"{_SEGMENT}/clip_ratio/region_mean",
    "gradient norm": "grad_norm",
    "groups with equal rewards": "(.*/)?frac_reward_zero_std",
    "cut texts": f"{_SEGMENT}/completions/clipped_ratio",
    "images and tokens per second": "perf/.*_per_second",
    "seconds of a step": "step_time|phase/.*_seconds",
}
"""Title of a chart -> regex of its metrics."""
RANGES = {
    "length of {}, shortest to longest": "{}/completions/{}_length",
    "importance ratio of {}, least to largest": "{}/sampling/importance_sampling_ratio/{}",
}
"""Title of a chart of a segment -> its metric with the mean, between those with `min` and `max`."""


def make_layout(names: Collection[str]) -> Layout:
    """Returns the charts of the metrics in `names`: rewards, evaluations, health."""
    groups = {
        "Rewards": {
            "reward": "(.*/)?reward",
            **{
                f"rewards of {task}": f"{task}/rewards/[^/]+/mean" for task in TASKS
            },
            "standard deviation within groups": "(.*/)?reward_group_std",
        },
        "Loss": {
            "loss": "(.*/)?loss",
            "negative log-likelihood": ".*/nll",
            "image tokenizer": "vq/.*",
        },
        "Health": HEALTH,
    }  # fmt: skip
    layout: dict[str, dict[str, Chart]] = {}
    for group, charts in groups.items():
        for title, regex in charts.items():
            shown = sorted(name for name in names if re.fullmatch(regex, name))
            if shown:
                # TensorBoard looks for the regex anywhere in a name.
                chart = Chart("Multiline", tuple(f"^{re.escape(name)}$" for name in shown))
                layout.setdefault(group, {})[title] = chart
        if group == "Rewards" and (evaluations := _chart_evaluations(names)):
            layout["Evaluation"] = evaluations
    layout.setdefault("Health", {}).update(_chart_ranges(names))
    return layout


def _chart_ranges(names: Collection[str]) -> dict[str, Chart]:
    """Returns a chart of each mean of `RANGES` between its smallest and largest value."""
    charts = {}
    for title, metric in RANGES.items():
        for segment in list_segments():
            shown = tuple(metric.format(segment, kind) for kind in ("mean", "min", "max"))
            if set(shown) <= set(names):
                charts[title.format(segment)] = Chart("Margin", shown)
    return charts


def _chart_evaluations(names: Collection[str]) -> dict[str, Chart]:
    """Returns a chart of each metric of an evaluation, with its interval if it has one."""
    charts = {}
    for name in sorted(names, key=_put_accuracy_first):
        low, high = f"{name}_low", f"{name}_high"
        if low in names and high in names:
            shown = tuple(map(rename_for_charts, (name, low, high)))
            charts[name.removeprefix("eval/")] = Chart("Margin", shown)
        elif f"{name}_stderr" in names:
            charts[name.removeprefix("eval/")] = Chart("Multiline", (f"^{re.escape(name)}$",))
    return charts


def rename_for_charts(name: str) -> str:
    """Returns a metric's name in TensorBoard: the ends of intervals are apart from the scores."""
    if name.startswith("eval/") and name.endswith(("_low", "_high")):
        return name.replace("eval/", "intervals/", 1)
    return name


def _put_accuracy_first(name: str) -> tuple[bool, str]:
    return not name.endswith("/accuracy"), name


def find_option(tree: Mapping[str, Any], key: str) -> Any:
    """Returns the value of an option such as `lora.rank` in the nested dict of a config."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value
