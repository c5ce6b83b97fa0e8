"""Opens the rows that a run reads: those to train on and those held out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.config.checks import check_warmup
from corl_jax.config.schema import Config
from corl_jax.data.column_values import find_value_problem
from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.dataset import (
    Loader,
    LoaderOptions,
    Source,
    split_held_out_rows,
)
from corl_jax.data.loader_options import FindProblem
from corl_jax.data.sources import open_source
from corl_jax.errors import InputError
from corl_jax.evaluation import SUITES
from corl_jax.hub_headers import has_partial_data
from corl_jax.rewards import registry
from corl_jax.train.stages import Stage, list_columns_to_read, list_made_columns


def open_sources(
    config: Config, stage: Stage, rewards: Mapping[str, Sequence[registry.BoundReward]]
) -> tuple[Source, Source | None]:
    """Returns (rows to train on, held-out rows), with every column that something will read.

    Raises:
        InputError: unreadable files, and the columns that are missing.
    """
    bound_rewards = [reward for of_task in rewards.values() for reward in of_task]
    names = list_columns_to_read(stage, config, bound_rewards)

    def open_rows(path: Any, more: Sequence[str] = (), **options: Any) -> Source:
        required = sorted({*names, *more})
        source = open_source(path, columns=config.data.columns, required=required, **options)
        available = (*source.names, *list_made_columns(stage.tasks(config)))
        problems = registry.find_missing_columns(bound_rewards, available)
        if problems:
            raise InputError(problems)
        return source

    data, held_out = config.data, config.eval
    chosen: dict[str, Any] = {"name": data.name, "revision": data.revision}
    if held_out.suite == "none":
        return open_rows(data.path, split=data.split, **chosen), None
    measured = SUITES[held_out.suite].columns
    # An evaluation may read more columns than training: of its own file, or of the shared one.
    if held_out.path is not None or held_out.split is not None:
        shared = held_out.path in (None, data.path)
        return open_rows(data.path, split=data.split, **chosen), open_rows(
            data.path if shared else held_out.path, measured, split=held_out.split,
            **(chosen if shared else {}),
        )  # fmt: skip
    source = open_rows(data.path, measured, split=data.split, **chosen)
    return split_held_out_rows(source, held_out.rows)


def make_loaders(
    config: Config,
    stage: Stage,
    processor: Any,
    shard: tuple[int, int],
    rewards: Sequence[registry.BoundReward],
    sources: tuple[Source, Source | None],
) -> tuple[Loader, Loader | None]:
    """Returns the loaders of both sources; `shard` is (this process's shard, their number).

    Raises:
        InputError: rows that cannot be used, or a run too short for its warm-up.
    """
    data, tasks, (trained, held_out) = config.data, stage.tasks(config), sources
    common: dict[str, Any] = {
        "seed": config.seed,
        "max_prompt_length": data.max_prompt_length,
        "max_bad_fraction": data.max_bad_fraction,
        "cache_rows": data.cache_rows,
        "readable": make_column_checks(config, stage, processor, rewards),
        "process_index": shard[0],
        "process_count": shard[1],
    }
    # In file order if only headers are here: a shuffled batch would need most of the data set.
    options = LoaderOptions(
        tasks=tasks, batch_size=config.train.prompts_per_step,
        required=stage.target_columns(config), shuffle=not has_partial_data(), **common,
    )  # fmt: skip
    train = Loader(trained, processor, options)
    train.check()
    # Only here: without train.max_steps the length is known when the rows are counted.
    if steps := count_steps(config, train):
        check_warmup(config, steps)
    if held_out is None:
        return train, None
    measured = SUITES[config.eval.suite].tasks or tasks
    batch = config.eval.batch_prompts
    options = LoaderOptions(tasks=measured, batch_size=batch, shuffle=False, **common)
    return train, Loader(held_out, processor, options)


def count_steps(config: Config, loader: Loader) -> int:
    """Returns the number of iterations of the run; 0 only if train.max_steps says so."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    epochs = config.train.epochs * len(loader.source) / config.train.prompts_per_step
    # At least one: rows that fill less than half of a batch would round to 0 steps.
    return max(1, round(epochs))


def make_column_checks(
    config: Config, stage: Stage, processor: Any, rewards: Sequence[registry.BoundReward]
) -> dict[str, FindProblem]:
    """Returns a check of each column that the stage and the built-in rewards read.

    Images are checked elsewhere, and a user's reward may read any value.
    """
    targets = set(stage.target_columns(config))
    read = {*targets}
    for reward in rewards:
        if reward.name in registry.REGISTRY:
            row = reward.row
            read |= {*row.columns, *row.either, *row.optional}
    return {
        name: functools.partial(_find_text_problem, processor, name)
        if name in targets
        else functools.partial(find_value_problem, name)
        for name in sorted(read - {IMAGE_COLUMN})
    }


def _find_text_problem(
    processor: Any, name: str, value: Any, columns: Mapping[str, Any]
) -> str | None:
    """Returns the problem of a value that the model is to say, or None."""
    if problem := find_value_problem(name, value, columns):
        return problem
    try:
        # Here and not in the step that needs it, where a text that cannot be used ends the run.
        processor.answer_ids(value if isinstance(value, str) else "")
    except InputError as error:
        return "; ".join(error.problems)
    return None
