"""Shows the completions of an iteration: files of samples, groups, answers and histograms.

All of it is of the rows that the first process holds, so that none has to send its images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from corl_jax.algorithms.advantages import AdvantageOptions, RewardInputs, total_rewards
from corl_jax.algorithms.ratios import NUM_RATIO_BINS, RATIO_RANGE
from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.devices.batches import to_host_rows
from corl_jax.rewards.samples import Samples
from corl_jax.runs import pictures, sample_files
from corl_jax.runs.directory import SAMPLES
from corl_jax.runs.log import RunLog
from corl_jax.runs.outputs import Outputs
from corl_jax.tasks import PLAN_COLUMN, TASKS
from corl_jax.train import dashboard
from corl_jax.train.agreement import RATIO_SHARES
from corl_jax.train.reports import are_completions_due, choose_color
from corl_jax.train.run import Iteration, Run, put_batch

SHOWN_GROUPS, TABLE_GROUPS = 4, 8
"""Groups of a step on a page of images, and in the table of answers."""
ANSWER_LINES = 4
TABLE_TEXT = 160  # characters of a question or an answer in the table
BINS = 30  # of a histogram of rewards or advantages
SOLUTION_COLUMN = "qa_solution"


@dataclasses.dataclass(frozen=True)
class Completions:
    """The completions of one task that this process holds, on the host."""

    task: str
    samples: Samples
    rewards: Mapping[str, np.ndarray]  # name -> [N], NaN where not applicable
    totals: np.ndarray  # [N] weighted sums of the rewards
    advantages: np.ndarray  # [N]
    lengths: np.ndarray  # [N]
    group_size: int

    @property
    def captions(self) -> Sequence[str]:
        """The prompt or question of each completion."""
        return self.samples.columns[TASKS[self.task].shown]

    @property
    def questions(self) -> Sequence[str]:
        """The question about each generated image; none for tasks that ask none."""
        column = TASKS[self.task].question
        return self.samples.columns[column] if column else ()

    @property
    def plans(self) -> Sequence[str]:
        """The plan of each image; none for tasks without plans."""
        return self.samples.columns[PLAN_COLUMN] if TASKS[self.task].has_plan else ()

    def get_image(self, row: int) -> Any:
        """Returns the generated image, or the image that the question is about."""
        if self.samples.images is not None:
            return self.samples.images[row]
        return self.samples.columns[IMAGE_COLUMN][row]

    def choose_groups(self, count: int) -> list[tuple[int, int]]:
        """Returns (best, worst) completion of groups with a reward, most different ones first."""
        groups = self.totals.reshape(-1, self.group_size)
        chosen = [number for number, group in enumerate(groups) if not np.isnan(group).all()]
        chosen.sort(key=lambda number: np.nanmin(groups[number]) - np.nanmax(groups[number]))
        pairs = [(np.nanargmax(groups[n]), np.nanargmin(groups[n])) for n in chosen[:count]]
        return [
            (number * self.group_size + int(best), number * self.group_size + int(worst))
            for number, (best, worst) in zip(chosen, pairs)
        ]

    def describe(self, row: int) -> dict[str, float]:
        """Returns the numbers of a completion: rewards, their sum, advantage and length."""
        return {
            "reward": float(self.totals[row]),
            **{name: float(values[row]) for name, values in self.rewards.items()},
            "advantage": float(self.advantages[row]),
            "tokens": float(self.lengths[row]),
        }


def collect_completions(run: Run, iteration: Iteration, task: str) -> Completions:
    """Copies this process's completions of a task to the host. All processes must call it."""
    rewards = iteration.rewards[task]
    # [rewards, N] -> [N, rewards], because rows are spread over the leading axis.
    stacked = put_batch(run, np.stack([*rewards.values()]).T)
    totals = _add_rewards(stacked, task=task, options=run.advantage_options)
    return Completions(
        task, iteration.samples[task], rewards, to_host_rows(totals),
        to_host_rows(iteration.advantages[task]), to_host_rows(iteration.lengths[task]),
        run.group_size,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("task", "options"))
def _add_rewards(stacked: jax.Array, *, task: str, options: AdvantageOptions) -> jax.Array:
    """Returns the weighted sums [N] of rewards [N, F]."""
    return total_rewards(RewardInputs({task: stacked.T}), options)[task]


# ---- when


def show_run(config: Config, log: RunLog, step: int) -> None:
    """Shows the config of the run in TensorBoard: as text, and the options that HParams lists."""
    log.add_text(step, "config", f"```\n{config_files.dump(config)}\n```")
    tree = config.model_dump(mode="json")
    options = {key: dashboard.find_option(tree, key) for key in dashboard.HPARAMS}
    log.add_hparams(step, options, dashboard.HPARAM_METRICS)


def show_iteration(
    config: Config, run: Run, outputs: Outputs, step: int, iteration: Iteration
) -> bool:
    """Shows what is due after `step` steps; returns whether that took time."""
    log = outputs.log
    if log.needs_layout and has_logged_steps(run, log):
        log.add_layout(step, dashboard.make_layout(log.names))
    every = config.log.samples_every
    is_shown = are_completions_due(config.log.images_every, run, step)
    is_saved = are_completions_due(every, run, step)
    if not iteration.samples or not (is_shown or is_saved):
        return False
    with log.pace.time_milestone(SAMPLES):
        tasks = [collect_completions(run, iteration, task) for task in iteration.samples]
        if not outputs.primary:
            return True
        if is_saved:
            path = outputs.directory.samples / f"step_{step:06d}.parquet"
            with log.tolerate_disk_errors(SAMPLES, ValueError):
                sample_files.write_samples(path, list_records(step, tasks))
        if is_shown:
            for completions in tasks:
                show_completions(log, step, completions)
            show_ratios(log, step, iteration)
    return True


def has_logged_steps(run: Run, log: RunLog) -> bool:
    """Returns whether a step of each task that takes turns has been logged, else any step."""
    shown = [f"{task}/loss" for task in run.tasks] if run.alternate_every else ["loss"]
    return log.names.issuperset(shown)


# ---- what


def list_records(step: int, tasks: Iterable[Completions]) -> list[dict[str, Any]]:
    """Returns the rows of the file of samples."""
    return [
        {
            "step": step,
            "task": part.task,
            "row": index // part.group_size,
            "completion": index % part.group_size,
            "prompt": part.captions[index],
            "question": part.questions[index] if part.questions else None,
            "image": part.get_image(index),
            "text": part.samples.texts[index] if part.samples.texts else None,
            PLAN_COLUMN: part.plans[index] if part.plans else None,
            "solution": part.samples.column(SOLUTION_COLUMN)[index] if part.samples.texts else None,
            "length": int(part.lengths[index]),
            "reward": float(part.totals[index]),
            **{
                f"{sample_files.REWARD_PREFIX}{name}": float(values[index])
                for name, values in part.rewards.items()
            },
            "advantage": float(part.advantages[index]),
        }
        for part in tasks
        for index in range(len(part.samples))
    ]


def show_completions(log: RunLog, step: int, completions: Completions) -> None:
    """Logs the best and the worst of groups, and histograms of rewards and advantages."""
    task, groups = completions.task, completions.choose_groups(SHOWN_GROUPS)
    if groups:
        draw = draw_answers if TASKS[task].makes_text else draw_pairs
        log.add_image(step, f"{task}/best_and_worst", draw(completions, groups))
    if TASKS[task].makes_text:
        log.add_text(step, f"{task}/answers", tabulate_answers(completions))
    if TASKS[task].has_plan:
        log.add_text(step, f"{task}/plans", tabulate_plans(completions))
    for name, values in (("reward", completions.totals), ("advantage", completions.advantages)):
        values = values[np.isfinite(values)]
        if len(values):
            log.add_histogram(step, f"histograms/{task}/{name}", *np.histogram(values, BINS))


def show_ratios(log: RunLog, step: int, iteration: Iteration) -> None:
    """Logs the histogram of importance ratios of each task, in tokens."""
    edges = np.linspace(*RATIO_RANGE, NUM_RATIO_BINS + 1)
    for name, shares in iteration.ratio_shares.items():
        task = name.removesuffix(f"/{RATIO_SHARES}")
        log.add_histogram(
            step, f"histograms/{task}/importance_ratio", np.asarray(shares, float), edges
        )


def draw_pairs(completions: Completions, groups: Sequence[tuple[int, int]]) -> np.ndarray:
    """Draws the best and the worst image of groups beside each other: [H, W, 3] uint8."""
    images, captions, numbers, frames = [], [], [], []
    for pair in groups:
        images.append([pictures.shrink(completions.get_image(row)) for row in pair])
        captions.append(completions.captions[pair[0]])
        values = [completions.describe(row) for row in pair]
        numbers.append([{name: v[name] for name in ("reward", "advantage")} for v in values])
        frames.append([choose_color(completions.advantages[row] or math.nan, 0) for row in pair])
    page = pictures.draw_samples(np.array(images), captions, numbers, "best and worst", frames)
    return page.pixels


def draw_answers(completions: Completions, groups: Sequence[tuple[int, int]]) -> np.ndarray:
    """Draws the image of each question with its best and its worst answer: [H, W, 3] uint8.

    Answers about generated images have an image each.
    """
    notes = []
    for pair in groups:
        rows = tuple(dict.fromkeys(pair))  # the best is the worst where all are equal
        for shown in [(row,) for row in rows] if completions.questions else [rows]:
            lines = list_question_lines(completions, shown[0])
            lines += [line for row in shown for line in list_answer_lines(completions, row)]
            notes.append((pictures.shrink(completions.get_image(shown[0])), lines))
    return pictures.draw_notes(notes)


def list_question_lines(completions: Completions, row: int) -> list[tuple[str, pictures.Color]]:
    """Returns the lines of a page that state prompt, question and solution of a completion."""
    width, lines = pictures.TEXT_WIDTH, []
    for text in (completions.captions[row], *completions.questions[row : row + 1]):
        text = " ".join(text.split())
        lines += [(line, pictures.INK) for line in pictures.wrap(text, width, 3)]
    solution = completions.samples.column(SOLUTION_COLUMN)[row]
    if solution is not None:
        text = f"solution: {solution}"
        lines += [(line, pictures.FAINT) for line in pictures.wrap(text, width, 1)]
    return lines


def list_answer_lines(completions: Completions, row: int) -> list[tuple[str, pictures.Color]]:
    """Returns the lines of a page that state numbers and answer of a completion."""
    color = choose_color(completions.advantages[row] or math.nan, 0) or pictures.FAINT
    head = "reward {reward:.3g}, advantage {advantage:+.2f}, {tokens:.0f} tokens"
    answer = completions.samples.require_texts()[row]
    lines = pictures.wrap(answer, pictures.TEXT_WIDTH, ANSWER_LINES)
    return [
        (head.format(**completions.describe(row)), color), *((line, pictures.INK) for line in lines)
    ]  # fmt: skip


def tabulate_answers(completions: Completions) -> str:
    """Returns a markdown table with the best and the worst answer of groups."""
    solutions = completions.samples.columns.get(SOLUTION_COLUMN)
    texts = completions.samples.require_texts()
    return _tabulate_texts(
        completions, completions.questions or completions.captions, texts, solutions,
        ("question", "answer"),
    )  # fmt: skip


def tabulate_plans(completions: Completions) -> str:
    """Returns a markdown table with the plans of the best and the worst image of groups."""
    plans, heads = completions.plans, ("prompt", PLAN_COLUMN)
    return _tabulate_texts(completions, completions.captions, plans, None, heads)


def _tabulate_texts(
    completions: Completions, captions: Sequence[str], texts: Sequence[str],
    solutions: Sequence[Any] | None, heads: tuple[str, str],
) -> str:  # fmt: skip
    groups = completions.choose_groups(TABLE_GROUPS)
    # The best is the worst where all are equal. The question stands beside the first of both.
    rows = [row for pair in groups for row in dict.fromkeys(pair)]
    firsts = {best for best, _ in groups}
    return pictures.format_answers_table(
        [captions[row] if row in firsts else "" for row in rows],
        [texts[row] for row in rows],
        [completions.describe(row) for row in rows],
        [str(solutions[row]) for row in rows] if solutions else None,
        TABLE_TEXT,
        heads,
    )
