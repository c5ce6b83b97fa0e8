"""What a run shows of its policy: numbers of iterations, images of fixed prompts, evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.devices import batches, processes
from corl_jax.evaluation import shapes
from corl_jax.params import merge
from corl_jax.policies import Model
from corl_jax.policies.family import SamplingOptions
from corl_jax.runs import pictures
from corl_jax.runs.log import RunLog, reduce_metrics
from corl_jax.runs.outputs import Outputs
from corl_jax.tasks import TASKS, image_tasks, text_tasks
from corl_jax.train import iteration as rl_iteration
from corl_jax.train.run import Iteration, Run, put
from corl_jax.train.step import TrainState
from corl_jax.types import Params, Prompts

TABLE_ROWS = 16
"""Answers shown in the text table of an iteration."""
SHEET_IMAGES, SHEET_COLUMNS = 36, 6  # of the image of an evaluation
ACCURACIES = ("draw/accuracy", "answer/accuracy")
"""Rates of the drawn world's evaluation that guards compare."""
HEADLINE = {
    "loss": "nan", "reward": "none",
    **{f"{task}/reward": "none" for task in TASKS}, **{f"{task}/nll": "nan" for task in TASKS},
    "kl": "nan", **{f"{task}/kl": "nan" for task in TASKS},
    "grad_norm": "nan", "eval/draw/accuracy": "nan", "eval/answer/accuracy": "nan",
}  # fmt: skip
"""What the console shows of a step, as far as it is there -> how it shows NaN."""


# ---- the log of an iteration


def describe_iteration(
    config: Config, run: Run, step: int, iteration: Iteration, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Returns all numbers of an iteration, after which `step` are done; `seconds` by metric."""
    values = reduce_metrics(iteration.metrics) | seconds
    values["learning_rate"] = float(run.schedule(max(values["update/applied"] - 1, 0)))
    values["epoch"] = step / run.train_loader.steps_per_epoch
    run.train_loader.share_unusable(processes.all_union)
    for kind, count in run.train_loader.counts.items():
        values[f"data/{kind}_rows"] = count
    rollout = values.get("phase/rollout_seconds")
    if rollout and image_tasks(run.tasks):
        images = config.train.prompts_per_step * run.group_size
        values["perf/images_per_second"] = images / rollout
    if rollout and text_tasks(run.tasks):
        tokens = sum(values[f"{task}/tokens"] for task in text_tasks(run.tasks))
        values["perf/tokens_per_second"] = tokens / rollout
    return values


def are_samples_due(config: Config, run: Run, step: int) -> bool:
    """Returns whether the log shows samples after `step` steps."""
    every = config.log.images_every
    return bool(every) and (step % every == 0 or step == run.steps)


def show_answers(config: Config, run: Run, log: RunLog, step: int, iteration: Iteration) -> None:
    """Logs a table of the iteration's first answers with their rewards, if samples are due."""
    if not are_samples_due(config, run, step):
        return
    for task in text_tasks(tuple(iteration.samples)):
        samples = iteration.samples[task]
        count = min(TABLE_ROWS, len(samples.texts))
        rewards = [
            {name: float(values[row]) for name, values in iteration.rewards[task].items()}
            for row in range(count)
        ]
        columns = {name: values[:count] for name, values in samples.columns.items()}
        table = pictures.answers_table(
            columns["qa_problem"], samples.texts[:count], rewards, columns.get("qa_solution")
        )
        log.add_text(step, f"{task}/answers", table)


# ---- images


def draw_fixed_prompts(
    config: Config, run: Run, outputs: Outputs, state: TrainState, step: int
) -> None:
    """Generates and saves images of the same held-out prompts with the same keys each time."""
    (task,) = image_tasks(run.tasks)
    prompts = choose_fixed_prompts(config, run)
    own = take_prompts(prompts, batches.take_own_rows(run.mesh, np.arange(len(prompts))))
    params = merge(state.params, run.frozen)
    rollout = rl_iteration.sample(run, task, params, own)
    samples = rl_iteration.decode(run, task, params, own, rollout)
    outputs.watchdog.beat()
    scores, _ = rl_iteration.score_samples(run, task, params, samples, step)
    scores = {name: batches.all_gather_rows(run.mesh, values) for name, values in scores.items()}
    images = batches.all_gather_rows(run.mesh, np.asarray(samples.images))
    if not outputs.primary:
        return
    shape = (len(prompts), run.group_size)
    rewards = [
        [
            {name: float(values.reshape(shape)[row, sample]) for name, values in scores.items()}
            for sample in range(run.group_size)
        ]
        for row in range(len(prompts))
    ]
    images = images.reshape(*shape, *images.shape[1:])
    page = pictures.grid(images, prompts.columns["prompt"], rewards, f"step {step}")
    save_page(outputs, step, f"step_{step:06d}.png", f"{task}/fixed_prompts", page)


def choose_fixed_prompts(config: Config, run: Run) -> Prompts:
    """Returns the first held-out prompts, or those of training without any; of all processes."""
    loader = run.eval_loader or run.train_loader
    shards = batches.num_batch_shards(run.mesh)
    # 10 prompts on 4 shards: 12, so that each shard has the same number.
    count = min(-(-config.log.fixed_prompts // shards) * shards, loader.batch_size)
    return loader.at(np.arange(count))


def take_prompts(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Returns the rows of a batch that are listed."""
    return Prompts(
        prompts.index[rows],
        {name: [values[i] for i in rows] for name, values in prompts.columns.items()},
        jax.tree.map(lambda x: x[rows], prompts.encoded),
    )


def save_page(outputs: Outputs, step: int, file: str, name: str, page: np.ndarray) -> None:
    """Saves a page of images as a file of the run, and logs it under a name."""
    with outputs.log.tolerate_disk_errors("images"):
        pictures.save_png(outputs.directory.images / file, page)
    outputs.log.add_image(step, name, page)


# ---- evaluation


def evaluate(config: Config, run: Run, outputs: Outputs, state: TrainState, step: int) -> None:
    """Evaluates the policy by the suite of the config, and logs it.

    Raises:
        GuardError: a fatal alarm begins.
    """
    params = merge(state.params, run.frozen)
    began = time.perf_counter()
    if config.eval.suite == "rewards":
        scores = evaluate_rewards(run, params, config.eval.rows, outputs.watchdog.beat)
        values = {}
        for name, (mean, error) in scores.items():
            values |= {name: mean, f"{name}_stderr": error}
    else:
        report = evaluate_drawn_world(config, run, params, outputs.watchdog.beat)
        values, scores = report.metrics(), estimate_accuracies(report)
        show_evaluation(outputs, step, report)
    values |= {"eval/seconds": time.perf_counter() - began}
    alarms, lines = outputs.guards.check_evaluation(step, scores)
    outputs.log.add_metrics(step, values | alarms, is_evaluation=True)
    outputs.log.raise_alarms(outputs.guards, lines)


def evaluate_drawn_world(
    config: Config, run: Run, params: Params, beat: Callable[[], None]
) -> shapes.Report:
    """Evaluates both tasks on the drawn world; calls `beat` at each batch."""

    def place(tree: Any) -> Any:
        beat()
        return put(run, tree)

    rollout = config.rollout
    model = Model(run.family, run.sizes, run.processor, Path(config.model.path), params)
    options = SamplingOptions(
        special=run.processor.special, cfg_scale=rollout.cfg_scale, dtype=run.dtype,
        temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens,
    )  # fmt: skip
    return shapes.evaluate_shapes(
        model, run.eval_loader, options, seed=run.seed, rows=config.eval.rows, place=place,
        total=lambda counts: batches.all_gather_rows(run.mesh, counts[None]).sum(axis=0),
    )  # fmt: skip


def estimate_accuracies(report: shapes.Report) -> dict[str, tuple[float, float]]:
    """Returns metric -> (mean, standard error) of an evaluation's two accuracies."""
    # Half the width of a 95% interval is 1.96 standard errors.
    return {
        f"eval/{name}": (rate.mean, (rate.high - rate.low) / (2 * 1.96))
        for name, rate in report.rates.items()
        if name in ACCURACIES and rate.n
    }


def show_evaluation(outputs: Outputs, step: int, report: shapes.Report) -> None:
    """Saves the first images of an evaluation; they are of the same rows and keys each time."""
    if not outputs.primary:
        return
    rate = report.rates["draw/accuracy"]
    title = f"step {step}: {rate.mean:.1%} of {rate.n} drawings as demanded"
    page = shapes.contact_sheet(report, SHEET_IMAGES, SHEET_COLUMNS, title)
    save_page(outputs, step, f"{pictures.HELD_OUT}_{step:06d}.png", "eval/drawings", page)


def evaluate_rewards(
    run: Run, params: Params, count: int, beat: Callable[[], None] = lambda: None
) -> dict[str, tuple[float, float]]:
    """Returns metric -> (mean, standard error) of the training rewards on held-out rows.

    Each of the first `count` rows counts once. `beat` is called at each batch.
    """
    loader = run.eval_loader
    count = min(count, len(loader.source))
    scores: dict[str, list[np.ndarray]] = {}
    for prompts in loader.iterate(0, -(-count // loader.batch_size)):
        beat()
        # The last batch may run into a second pass over the rows.
        is_counted = np.repeat(prompts.index < count, run.group_size)
        for task in run.tasks:
            rollout = rl_iteration.sample(run, task, params, prompts)
            samples = rl_iteration.decode(run, task, params, prompts, rollout)
            rewards, _ = rl_iteration.score_samples(run, task, params, samples, 0)
            for name, values in rewards.items():
                counted = np.where(is_counted, values, np.nan)
                rows = batches.all_gather_rows(run.mesh, counted)
                scores.setdefault(f"eval/{task}/{name}", []).append(rows)
    return {name: estimate_mean(np.concatenate(pieces)) for name, pieces in scores.items()}


def estimate_mean(values: np.ndarray) -> tuple[float, float]:
    """Returns (mean, standard error) of the values that are not NaN; NaN for too few."""
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else np.nan
    spread = float(values.std(ddof=1)) if values.size > 1 else np.nan
    return mean, spread / np.sqrt(max(values.size, 1))
