"""Reports on the policy of a run: numbers of iterations, images of fixed prompts, evaluations."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.devices import batches, processes
from corl_jax.evaluation import EvaluationInputs, Report
from corl_jax.params import merge
from corl_jax.policies.family import SamplingOptions
from corl_jax.rewards.registry import score_and_measure
from corl_jax.rewards.samples import Policy, Samples
from corl_jax.runs import pictures
from corl_jax.runs.log import reduce_metrics
from corl_jax.runs.outputs import Outputs, Progress
from corl_jax.sampling_options import choose_cfg_scale
from corl_jax.tasks import TASKS, TEXT, choose_tasks_of_step, image_tasks, list_segments
from corl_jax.train import iteration as rl_iteration
from corl_jax.train.average import choose_evaluated
from corl_jax.train.evaluations import Evaluation
from corl_jax.train.recipe_options import choose_eval_denoising
from corl_jax.train.run import Iteration, Run, put_batch
from corl_jax.train.step import TrainState
from corl_jax.types import Params, Prompts

FIXED_PROMPTS = 4
"""Prompts of an image grid."""
SHEET_IMAGES, SHEET_COLUMNS = 36, 6  # of the image of an evaluation
CARD_IMAGES, CARD_COLUMNS = 12, 3  # of the same in TensorBoard, so that it can be read on a card
HEADLINE = {
    "loss": "nan", "reward": "none",
    **{f"{task}/reward": "none" for task in TASKS}, **{f"{task}/nll": "nan" for task in TASKS},
    "kl": "nan", **{f"{segment}/kl": "nan" for segment in list_segments()},
    "grad_norm": "nan", "eval/draw/accuracy": "nan", "eval/answer/accuracy": "nan",
    "eval/own/accuracy": "nan", "eval/blank/accuracy": "nan",
}  # fmt: skip
"""Metric that the console shows of a step -> how it shows NaN. Missing metrics are left out."""
QUIET = ("alarm/", "data/", "update/skipped")
"""Prefixes of metrics that TensorBoard shows only once they are not 0."""
CARD_SAMPLES = 3
"""Images of a prompt that TensorBoard's grid shows, so that it can be read on a card."""
GOOD_REWARD = 0.5
"""An image is marked as good if the weighted mean of its rewards is above this."""


# ---- the log of an iteration


def describe_iteration(
    config: Config, run: Run, progress: Progress, step: int, iteration: Iteration,
    seconds: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """Returns all numbers of an iteration, after which `step` are done; `seconds` by metric."""
    values = {**reduce_metrics(iteration.metrics), **seconds}
    # The schedule counts updates from 0, so the newest one has the number of applied updates less
    # 1.
    values["learning_rate"] = float(run.schedule(max(values["update/applied"] - 1, 0)))
    if iteration.num_tokens is not None:
        values["num_tokens"] = progress.num_tokens
    values["epoch"] = step / run.train_loader.steps_per_epoch
    # Each process reads only its rows, so the unusable ones are collected before they are counted.
    run.train_loader.share_unusable(processes.all_union)
    for kind, count in run.train_loader.counts.items():
        values[f"data/{kind}_rows"] = count
    rollout = values.get("phase/rollout_seconds")
    tasks = choose_tasks_of_step(run.tasks, run.alternate_every, step - 1)
    if rollout and image_tasks(tasks):
        batches = 1 + values.get("redraw/batches", 0)
        images = batches * config.train.prompts_per_step * run.completions_per_prompt
        values["perf/images_per_second"] = images / rollout
    names = [f"{segment}/tokens" for segment in list_segments(TEXT)]
    texts = [values[name] for name in names if name in values]
    if rollout and texts:
        values["perf/tokens_per_second"] = sum(texts) / rollout
    return values


def are_samples_due(every: int, run: Run, step: int) -> bool:
    """Returns whether samples are shown after `step` steps; `every` 0: never."""
    return bool(every) and (step % every == 0 or step == run.steps)


def are_completions_due(every: int, run: Run, step: int) -> bool:
    """Returns whether the completions of step `step`, counted from 1, are shown; `every` 0: never.

    If tasks take turns, the first step of each task from a multiple of `every` on is shown.
    """
    if are_samples_due(every, run, step):
        return True
    first = step - step % every if every else 0
    if not (run.alternate_every and first):
        return False
    # Every 50 with tasks that change each step: 50 trains mm2t, as do all multiples, and 51 t2i.
    trained = [
        choose_tasks_of_step(run.tasks, run.alternate_every, i - 1) for i in range(first, step + 1)
    ]
    return trained[-1] not in trained[:-1]


# ---- images


def draw_fixed_prompts(
    config: Config, run: Run, outputs: Outputs, state: TrainState, step: int
) -> None:
    """Generates and saves images of the same held-out prompts with the same keys each time.

    TensorBoard gets a smaller page than the file, for the width of its cards.
    """
    prompts = choose_fixed_prompts(config, run)
    for number, task in enumerate(image_tasks(run.tasks)):
        grid = sample_grid(run, outputs, task, state, step, prompts)
        if grid is None:
            continue
        file = f"step_{step:06d}{f'_{task}' if number else ''}.png"
        save_page(outputs, file, grid.draw())
        outputs.log.add_image(step, f"{task}/fixed_prompts", grid.draw_card().pixels)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images of a task for some prompts, with their rewards."""

    images: np.ndarray  # [prompts, samples, H, W, 3] uint8
    captions: Sequence[str]
    rewards: list[list[dict[str, float]]]  # of each prompt and sample, NaN where not applicable
    totals: np.ndarray  # [prompts, samples] weighted means of the rewards
    title: str

    def draw(self) -> pictures.Page:
        """Returns a page with all samples and all rewards."""
        return pictures.draw_samples(
            self.images, self.captions, self.rewards, self.title, self._choose_frames()
        )

    def draw_card(self) -> pictures.Page:
        """Returns a page with the first samples of each prompt and their mean reward."""
        count = min(CARD_SAMPLES, self.images.shape[1])
        images = np.stack([[pictures.shrink(x) for x in row[:count]] for row in self.images])
        rewards = [[{"reward": float(x)} for x in row[:count]] for row in self.totals]
        frames = [row[:count] for row in self._choose_frames()]
        title = self.title
        if not np.isnan(self.totals).all():  # with rewards
            title += f", mean reward {np.nanmean(self.totals):.2f}"
        return pictures.draw_samples(images, self.captions, rewards, title, frames)

    def _choose_frames(self) -> list[list[pictures.Color | None]]:
        return [[choose_color(total, GOOD_REWARD) for total in row] for row in self.totals]


def choose_color(value: float, limit: float) -> pictures.Color | None:
    """Returns green above the limit, else red; None for NaN."""
    if math.isnan(value):
        return None
    return pictures.GOOD if value > limit else pictures.BAD


def sample_grid(
    run: Run, outputs: Outputs, task: str, state: TrainState, step: int, prompts: Prompts
) -> Grid | None:
    """Returns images of a task with their rewards; None but for the first process."""
    own_prompts = take_prompts(prompts, batches.take_own_rows(run.mesh, np.arange(len(prompts))))
    params = merge(choose_evaluated(state), run.frozen)
    rollout = rl_iteration.sample(run, task, params, own_prompts)
    samples = rl_iteration.decode(run, task, params, own_prompts, rollout)
    outputs.watchdog.beat()
    scores, _ = rl_iteration.score_samples(run, task, params, samples, step)
    scores = {name: batches.all_gather_rows(run.mesh, values) for name, values in scores.items()}
    # Before the return below: all processes must take part in a gather.
    images = batches.all_gather_rows(run.mesh, np.asarray(samples.images))
    if not outputs.primary:
        return None
    shape = (len(prompts), run.group_size)
    rewards = [
        [
            {name: float(values.reshape(shape)[row, sample]) for name, values in scores.items()}
            for sample in range(run.group_size)
        ]
        for row in range(len(prompts))
    ]
    return Grid(
        images.reshape(*shape, *images.shape[1:]), prompts.columns[TASKS[task].shown], rewards,
        np.broadcast_to(average_rewards(run, task, scores), images.shape[:1]).reshape(shape),
        f"step {step}",
    )  # fmt: skip


def average_rewards(run: Run, task: str, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the weighted means [N] of a task's rewards, over those that apply; NaN without.

    Returns [1] for a task without rewards, as in a supervised stage.
    """
    if not scores:
        return np.array([math.nan])
    weights = {reward.name: reward.weight for reward in run.rewards[task]}
    stacked = np.stack([*scores.values()])
    applied = np.array([weights[name] for name in scores])[:, None] * ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (np.nan_to_num(stacked) * applied).sum(axis=0) / np.abs(applied).sum(axis=0)


def choose_fixed_prompts(config: Config, run: Run) -> Prompts:
    """Returns the first held-out prompts, or those of training without any; of all processes."""
    # Only rows of eval.suite have the columns of the data.
    held_out = [evaluation.loader for evaluation in run.evaluations if not evaluation.name]
    loader = held_out[0] if held_out else run.train_loader
    shards = batches.num_batch_shards(run.mesh)
    # Rounded up to equal shards: 4 prompts on 3 shards -> 6.
    count = min(-(-FIXED_PROMPTS // shards) * shards, loader.batch_size)
    return loader.read_rows(np.arange(count))


def take_prompts(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Returns some rows of a batch."""
    return Prompts(
        prompts.index[rows],
        {name: [values[i] for i in rows] for name, values in prompts.columns.items()},
        jax.tree.map(lambda x: x[rows], prompts.encoded),
    )


def save_page(outputs: Outputs, file: str, page: pictures.Page) -> None:
    """Saves a page of images as a file of the run."""
    with outputs.log.tolerate_disk_errors("images"):
        pictures.save_png(outputs.directory.images / file, page.pixels, page.format_notes())


# ---- evaluation


def evaluate(config: Config, run: Run, outputs: Outputs, state: TrainState, step: int) -> None:
    """Evaluates the policy by each suite of the config, and logs it.

    Raises:
        GuardError: a fatal alarm begins.
    """
    params = merge(choose_evaluated(state), run.frozen)
    began = time.perf_counter()
    values, scores = {}, {}
    for evaluation in run.evaluations:
        inputs = make_evaluation_inputs(config, run, evaluation, params, outputs.watchdog.beat)
        report = evaluation.suite.evaluate(inputs)
        values |= evaluation.rename(report.metrics())
        scores |= evaluation.rename(report.scores())
        if outputs.primary:
            show_drawings(outputs, evaluation, report, step)
    values["eval/seconds"] = time.perf_counter() - began
    alarms, lines = outputs.guards.check_evaluation(step, scores)
    outputs.log.add_metrics(step, values | alarms, is_evaluation=True)
    outputs.log.raise_alarms(outputs.guards, lines)


def show_drawings(outputs: Outputs, evaluation: Evaluation, report: Report, step: int) -> None:
    """Saves a page of the images of an evaluation, if it has any, and logs a smaller one."""
    page = report.draw(f"step {step}", SHEET_IMAGES, SHEET_COLUMNS)
    card = report.draw(f"step {step}", CARD_IMAGES, CARD_COLUMNS)
    if page is None or card is None:
        return
    save_page(outputs, f"{evaluation.name or pictures.HELD_OUT}_{step:06d}.png", page)
    outputs.log.add_image(step, *evaluation.rename({"eval/drawings": card.pixels}).popitem())


def make_evaluation_inputs(
    config: Config, run: Run, evaluation: Evaluation, params: Params,
    beat: Callable[[], None] = lambda: None,
) -> EvaluationInputs:  # fmt: skip
    """Returns the inputs of an evaluation suite; `beat` tells the watchdog of each batch."""

    def place(tree: Any) -> Any:
        beat()
        return put_batch(run, tree)

    def score(prompts: Prompts) -> dict[str, np.ndarray]:
        beat()
        scores = {}
        for task in run.tasks:
            rollout = rl_iteration.sample(run, task, params, prompts)
            samples = rl_iteration.decode(run, task, params, prompts, rollout)
            rewards, _ = rl_iteration.score_samples(run, task, params, samples, 0)
            scores |= {f"{task}/{name}": values for name, values in rewards.items()}
        return scores

    def judge(samples: Samples) -> dict[str, np.ndarray]:
        beat()
        context = rl_iteration.make_context(run, params, 0)
        return score_and_measure(evaluation.rewards, samples, context)[0]

    options = SamplingOptions(
        special=run.processor.special, dtype=run.dtype,
        cfg_scale=choose_cfg_scale(config.rollout.cfg_scale, run.family),
        temperature=config.rollout.temperature, max_new_tokens=config.rollout.max_new_tokens,
        image_window=config.rollout.image_window, image=run.processor.image,
        # Steps of unmasking are the model's usual ones, as `corl-jax evaluate` has them: figures of
        # a run are those of its export, in however few steps the run samples.
        denoising=choose_eval_denoising(
            config.denoising, run.family.limits(run.sizes).latent_tokens
        ),
    )  # fmt: skip
    return EvaluationInputs(
        policy=Policy(run.family, run.sizes, params, run.processor, run.dtype),
        batches=evaluation.loader,
        sampling=options,
        seed=run.seed,
        rows=evaluation.rows,
        place=place,
        gather=lambda rows: batches.all_gather_rows(run.mesh, rows),
        score=score,
        judge=judge,
    )
