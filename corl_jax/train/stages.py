"""Defines the stages of a training: what a step is, which rows it reads, what it trains.

A stage is a row of `STAGES`; `config.stage` names one, and nothing else compares that name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax

from corl_jax.algorithms.likelihoods import NEGATIVE_LOG_LIKELIHOOD, ROW_LIKELIHOOD
from corl_jax.algorithms.losses import Loss
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config.schema import Config
from corl_jax.config.stages import STAGE_FACTS, StageFacts
from corl_jax.data.columns import ANSWER_COLUMN, IMAGE_COLUMN
from corl_jax.evaluation import SUITES, Suite
from corl_jax.policies.family import StraightThrough
from corl_jax.tasks import (
    PLAN_COLUMN,
    SELF_QUESTIONING,
    TASKS,
    TEXT,
    choose_tasks,
    name_segments,
    plan_tasks,
    required_columns,
    text_tasks,
)
from corl_jax.train import ahead, image_tokenizer, iteration, self_sft, sft
from corl_jax.train.step import UpdateOptions, make_train_step

MakeStep = Callable[..., Callable]
"""(run outline, UpdateOptions, optimizer, **jit) -> the jitted step."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of `STAGES`; functions take the config."""

    iterate: Callable  # (run, state, prompts, step) -> (state, Iteration)
    make_step: MakeStep
    tasks: Callable[[Config], tuple[str, ...]]  # whose prompts are encoded
    target_columns: Callable[[Config], list[str]]  # learned from; a row must have them
    loss: Callable[[Config], Loss]
    loss_weights: Callable[[Config], dict[str, float]]  # by metric prefix of a segment
    facts: StageFacts
    # how the gradient of an answer flows into the policy's own image; None: it does not
    straight_through: Callable[[Config], StraightThrough | None] = lambda config: None
    # compiles the programs of a step before it; None: the step does
    compile_step: ahead.CompileStep | None = None

    @property
    def samples(self) -> bool:
        """True if completions are sampled and rewarded."""
        return self.facts.has_rollouts

    @property
    def compares(self) -> bool:
        """True if completions are compared, and learned from by their advantages."""
        return self.facts.compares

    @property
    def uses_language_model(self) -> bool:
        """True if prompts are read; False if the image tokenizer alone is trained."""
        return self.facts.trains_language_model

    def updates_per_step(self, config: Config) -> int:
        """Returns the optimizer steps of an iteration."""
        return config.algorithm.num_iterations if self.compares else 1


def _choose_rl_tasks(config: Config) -> tuple[str, ...]:
    return choose_tasks(config.algorithm.tasks)


def _weigh_rl_tasks(config: Config) -> dict[str, float]:
    algorithm = config.algorithm
    weights = {}
    for name, task in TASKS.items():
        *earlier, last = name_segments(name, task.segments)
        weights |= dict.fromkeys(earlier, algorithm.earlier_loss_weight)
        weights[last] = algorithm.mm2t_loss_weight if task.segments[-1] == TEXT else 1.0
    return weights


def _weigh_sft_batches(config: Config) -> dict[str, float]:
    weight = sft.choose_image_weight(config)
    weights = {name: 1.0 if task.makes_text else weight for name, task in TASKS.items()}
    # Captions and texts are no tasks, but further kinds of completions beside them.
    return weights | {sft.CAPTION: 1.0, sft.PLAIN_TEXT: sft.PLAIN_TEXT_WEIGHT}


def _choose_sft_tasks(config: Config) -> tuple[str, ...]:
    return choose_tasks(config.sft.tasks)


def _list_sft_columns(config: Config) -> list[str]:
    optional = [config.sft.text_column]
    columns = [IMAGE_COLUMN]
    if text_tasks(_choose_sft_tasks(config)):
        columns.append(ANSWER_COLUMN)
        optional.insert(0, config.sft.caption_column)
    return [*columns, *filter(None, optional)]


def _make_token_step(outline: Any, options: UpdateOptions, optimizer: Any, **jit: Any) -> Callable:
    return make_train_step(outline.family, outline.sizes, options, optimizer, **jit)


def _make_pixel_step(
    outline: Any, options: UpdateOptions, optimizer: optax.GradientTransformation, **jit: Any
) -> Callable:
    return image_tokenizer.make_tokenizer_step(outline.family, outline.sizes, optimizer, **jit)


STAGES: dict[str, Stage] = {
    "rl": Stage(
        iterate=iteration.rl_iteration,
        make_step=_make_token_step,
        tasks=_choose_rl_tasks,
        target_columns=lambda config: [],
        loss=lambda config: RECIPES[config.algorithm.name].loss,
        loss_weights=_weigh_rl_tasks,
        facts=STAGE_FACTS["rl"],
        compile_step=ahead.compile_rl_step,
    ),
    "sft": Stage(
        iterate=sft.sft_iteration,
        make_step=_make_token_step,
        tasks=_choose_sft_tasks,
        target_columns=_list_sft_columns,
        loss=lambda config: NEGATIVE_LOG_LIKELIHOOD,
        loss_weights=_weigh_sft_batches,
        facts=STAGE_FACTS["sft"],
    ),
    "self_sft": Stage(
        iterate=self_sft.self_sft_iteration,
        make_step=_make_token_step,
        tasks=lambda config: SELF_QUESTIONING,
        target_columns=lambda config: [self_sft.TARGET_COLUMN],
        loss=lambda config: ROW_LIKELIHOOD,
        loss_weights=self_sft.weigh_segments,
        facts=STAGE_FACTS["self_sft"],
    ),
    "self_sft_through": Stage(
        iterate=self_sft.self_sft_iteration,
        make_step=_make_token_step,
        tasks=lambda config: SELF_QUESTIONING,
        target_columns=lambda config: [self_sft.TARGET_COLUMN],
        loss=lambda config: ROW_LIKELIHOOD,
        loss_weights=self_sft.weigh_segments,
        facts=STAGE_FACTS["self_sft_through"],
        straight_through=lambda config: StraightThrough(config.sft.redraw),
    ),
    "vq": Stage(
        iterate=image_tokenizer.tokenizer_iteration,
        make_step=_make_pixel_step,
        tasks=lambda config: (),
        target_columns=lambda config: [IMAGE_COLUMN],
        loss=lambda config: NEGATIVE_LOG_LIKELIHOOD,
        loss_weights=lambda config: {},
        facts=STAGE_FACTS["vq"],
    ),
}


def list_columns_to_read(stage: Stage, config: Config, rewards: Sequence[Any]) -> set[str]:
    """Returns the columns that the stage's prompts, its targets and the rewards read."""
    tasks = stage.tasks(config)
    columns = {*required_columns(tasks), *stage.target_columns(config)}
    columns = columns.union(*(reward.row.columns for reward in rewards))
    return columns - set(list_made_columns(tasks))


def list_made_columns(tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns that the tasks make themselves, for rewards to read."""
    return (PLAN_COLUMN,) if plan_tasks(tasks) else ()


def list_suites(config: Config) -> list[Suite]:
    """Returns the suites of a config that are known; a suite may stand several times."""
    names = [config.eval.suite, *(entry.suite for entry in config.eval.suites)]
    return [SUITES[name] for name in names if name in SUITES]


def scores_rewards(config: Config) -> bool:
    """Returns whether the training or an evaluation computes the rewards of the config."""
    suites = list_suites(config)
    return STAGES[config.stage].samples or any(suite.uses_rewards for suite in suites)
