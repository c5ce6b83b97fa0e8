"""Names of metrics in plain words."""

from __future__ import annotations

from corl_jax.tasks import TASKS

LABELS = {
    "eval/draw/accuracy": "Images that match their prompt",
    "eval/answer/accuracy": "Right answers",
    "eval/answer/mc": "Right answers: choice questions",
    "eval/answer/oe": "Right answers: open questions",
    "eval/answer/format": "Well-formed answers",
    "eval/draw/colors": "Images: colours",
    "eval/draw/color_attr": "Images: colour of each object",
    "eval/draw/two_object": "Images: two objects",
    "reward": "Reward",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "step_time": "Seconds per step",
    "frac_reward_zero_std": "Groups with equal rewards (fraction)",
    "perf/images_per_second": "Images per second",
    "perf/tokens_per_second": "Answer tokens per second",
    "phase/rollout_seconds": "sampling",
    "phase/reward_seconds": "rewards",
    "phase/update_seconds": "update",
    "phase/data_seconds": "data",
}


def describe_metric(name: str) -> str:
    """Returns a metric in plain words; a metric without words keeps its name."""
    if name in LABELS:
        return LABELS[name]
    if name.startswith("eval/draw/"):
        return f"Images: {name.rpartition('/')[2].replace('_', ' ')}"
    task, *parts = name.removeprefix("eval/").split("/")
    if task in TASKS and parts == ["reward"]:
        return f"Reward of {TASKS[task].description} ({task})"
    if task in TASKS and parts[:1] == ["rewards"] and parts[-1] == "mean":
        return f"{'/'.join(parts[1:-1])} ({task})"
    return name.removeprefix("eval/")
