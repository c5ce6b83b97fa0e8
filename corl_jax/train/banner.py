"""Describes a run in a few lines for the console, before its model is loaded."""

from __future__ import annotations

import datetime
import importlib.util
import shlex
from collections.abc import Sequence
from typing import Any

import jax

from corl_jax.params import partition
from corl_jax.rewards.registry import BoundReward
from corl_jax.runs.directory import RunDir
from corl_jax.tasks import TASKS
from corl_jax.train import check, memory
from corl_jax.train.resolve import ResolvedRun, RunOutline

Row = tuple[str, str]
"""A label and its text."""


def align_rows(rows: Sequence[Row]) -> str:
    """Returns a line for each row, with all texts in one column. A repeated label is left out."""
    width = max(len(label) for label, _ in rows)
    labels = [label for label, _ in rows]
    shown = [label if label not in labels[at - 1 : at] else "" for at, label in enumerate(labels)]
    return "\n".join(
        f"{label:{width}}  {text}" for label, (_, text) in zip(shown, rows, strict=True)
    )


def describe_start(plan: ResolvedRun, directory: RunDir) -> str:
    """Returns what the run trains, on which devices, with how much memory and with which data."""
    num_held_out = sum(evaluation.rows for evaluation in plan.evaluations)
    held_out = f", {num_held_out:,} held out" if num_held_out else ""
    rows = [
        ("run", str(directory.root)),
        ("model", describe_model(plan)),
        ("devices", describe_devices(plan)),
        ("data", f"{len(plan.train_loader.source):,} rows to train on{held_out}"),
        ("steps", describe_steps(plan)),
        *(("rewards", text) for text in describe_rewards(plan)),
        *(("memory", text) for text in describe_memory(plan)),
        ("curves", suggest_tensorboard(directory)),
    ]
    return align_rows(rows)


def describe_model(plan: ResolvedRun) -> str:
    """Returns the model's place, and how many of its parameters are trained."""
    shapes = plan.family.abstract(plan.sizes)
    trained, _ = partition(shapes, plan.trained)
    total, count = memory.count_parameters(shapes), memory.count_parameters(trained)
    lora = plan.config.lora
    adapters = f", in adapters of rank {lora.rank}" if lora.rank else ""
    return (
        f"{plan.model_dir}: {plan.family.name}, {total:,} parameters, {count:,} trained{adapters}"
    )


def describe_devices(plan: RunOutline) -> str:
    """Returns number and kind of the devices, their mesh, and the attention kernels."""
    mesh = plan.mesh
    texts = [f"{mesh.size} x {mesh.devices.flat[0].device_kind}"]
    if jax.process_count() > 1:
        texts[0] += f" of {jax.process_count()} processes"
    if mesh.size > 1:
        axes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
        texts.append(f"mesh {' x '.join(axes)}")
    if chosen := check.describe_attention(plan):
        texts.append(chosen)
    return ", ".join(texts)


def describe_steps(plan: ResolvedRun) -> str:
    """Returns the number of steps, the size of a step, and the updates of the optimizer."""
    train, parts = plan.config.train, []
    rows = f"{plan.steps:,} of {train.prompts_per_step}"
    if plan.stage.samples:
        group = plan.config.rollout.group_size
        results = [f"{group} {result}" for task in plan.tasks for result in TASKS[task].results]
        parts.append(f"{rows} prompts, each with {' and '.join(results)}")
    else:
        parts.append(f"{rows} rows, stage {plan.config.stage}")
    if plan.micro_batches > 1:
        parts.append(f"in {plan.micro_batches} micro-batches")
    if plan.updates_per_step > 1:
        parts.append(f"{plan.updates_per_step} updates per step")
    return ", ".join(parts)


def describe_rewards(plan: ResolvedRun) -> list[str]:
    """Returns a text for each task with rewards: their names, and weights that are not 1."""
    return [
        f"{task}: {', '.join(map(_format_reward, of_task))}"
        for task, of_task in plan.rewards.items()
        if of_task
    ]


def _format_reward(reward: BoundReward) -> str:
    return reward.name if reward.weight == 1 else f"{reward.weight:g} x {reward.name}"


def describe_memory(plan: ResolvedRun) -> list[str]:
    """Returns the estimate of `--check` beside a device's memory, and what it counts."""
    estimate = memory.estimate_memory(plan)
    _, programs = memory.add_up_memory(estimate)
    device = f" of {_format_gib(limit)}" if (limit := _read_memory_limit()) else ""
    sizes = [f"{_format_gib(size)} {program}" for program, size in programs.items()]
    basis = [memory.describe_counted(plan, estimate), memory.describe_first_batch(plan)]
    return [f"of each device{device} at least {', '.join(sizes)}", *filter(None, basis)]


def _read_memory_limit() -> float | None:
    """Returns the GiB of a local device that JAX may use; None where it does not say."""
    statistics: Any = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return limit / memory.GIB if limit else None


def _format_gib(size: float) -> str:
    return f"{size:.1f} GiB" if size >= 1 else f"{1024 * size:.0f} MiB"


def suggest_tensorboard(directory: RunDir) -> str:
    """Returns the command that shows the run's curves."""
    command = f"tensorboard --logdir {shlex.quote(str(directory.tensorboard))}"
    if importlib.util.find_spec("tensorboard") is None:
        command += "  (pip install tensorboard)"
    return command


def describe_resumption(step: int, steps: int, saved_at: float | None) -> str:
    """Returns a line about the restored step; `saved_at`: seconds since 1970, if it is known."""
    when = ""
    if saved_at is not None:
        when = f" of {datetime.datetime.fromtimestamp(saved_at):%Y-%m-%d %H:%M}"
    return f"resuming from step {step}/{steps}{when}"
