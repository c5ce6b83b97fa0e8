"""Opens the evaluations of a run: that of `eval.suite`, and those of `eval.suites`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.config.schema import Config, EvalSuite
from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.data.dataset import Loader, LoaderOptions, Rows, Source
from corl_jax.data.sources import open_source
from corl_jax.data.usable_rows import BadRow, UsableRows
from corl_jax.errors import InputError, Problems
from corl_jax.evaluation import SUITES, Suite
from corl_jax.nearest import suggest_name
from corl_jax.policies import PolicyFiles
from corl_jax.rewards.registry import BoundReward, bind_reward
from corl_jax.tasks import CODES, TASKS, TEXT, required_columns
from corl_jax.train.stages import Stage, list_columns_to_read

PREFIX = "eval/"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A suite with its rows."""

    suite: Suite
    loader: Loader
    rows: int  # rows that count; the loader's passes never end
    name: str = ""  # in metrics, eval/NAME/...; empty: eval/...
    rewards: Sequence[BoundReward] = ()  # of `Suite.rewards`

    def rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of a report with the evaluation's name in theirs."""
        if not self.name:
            return dict(values)
        # eval/accuracy -> eval/mmstar/accuracy
        return {
            f"{PREFIX}{self.name}/{name.removeprefix(PREFIX)}": value
            for name, value in values.items()
        }


def find_entry_problems(config: Config) -> list[str]:
    """Returns problems of the names in `eval.suites`: unknown suites, and names that repeat."""
    problems, seen = Problems(), set()
    for place, entry in enumerate(config.eval.suites):
        where, name = f"eval.suites.{place}", name_evaluation(entry)
        if entry.suite not in SUITES:
            known = suggest_name(entry.suite, SUITES)
            problems.add(f"{where}.suite: found {entry.suite!r}; {known}")
        if name in seen:
            problems.add(
                f"{where}: its metrics would be eval/{name}/.., as those of an earlier suite; set "
                f"{where}.name"
            )
        seen.add(name)
    return list(problems)


def name_evaluation(entry: EvalSuite) -> str:
    """Returns the name of an evaluation in metrics."""
    # MMStar.tsv -> MMStar
    return entry.name or re.sub(r"[^\w.-]+", "_", Path(entry.path).stem) or entry.suite


def open_evaluations(
    config: Config, stage: Stage, policy: PolicyFiles, shard: tuple[int, int],
    rewards: Sequence[BoundReward],
) -> list[Evaluation]:  # fmt: skip
    """Opens the files of `eval.suites` and reads every row of them once.

    `shard` is (this process's shard, their number).

    Raises:
        InputError: listing unreadable files and rows that cannot be sampled.
    """
    problems, evaluations = Problems(), []
    for place, entry in enumerate(config.eval.suites):
        if entry.suite not in SUITES:  # which is a problem already
            continue
        with problems.collect(f"eval.suites.{place}: "):
            evaluations.append(_open_evaluation(entry, config, stage, policy, shard, rewards))
    problems.raise_any()
    return evaluations


def _open_evaluation(
    entry: EvalSuite, config: Config, stage: Stage, policy: PolicyFiles, shard: tuple[int, int],
    rewards: Sequence[BoundReward],
) -> Evaluation:  # fmt: skip
    suite = SUITES[entry.suite]
    read = list_columns_to_read(stage, config, rewards) if suite.uses_rewards else set()
    sampled = suite.tasks or stage.tasks(config)
    columns = sorted({*suite.columns, *required_columns(sampled), *read})
    source = (
        suite.open_rows(entry.path, columns)
        if suite.open_rows
        else open_source(entry.path, required=columns)
    )
    source = Rows(source, 0, min(entry.rows or len(source), len(source)))
    options = LoaderOptions(
        tasks=sampled, batch_size=config.eval.batch_prompts, seed=config.seed, shuffle=False,
        max_prompt_length=_count_room(config, policy, sampled),
        # A row that replaces another one would count twice.
        max_bad_fraction=0.0, max_long_fraction=0.0,
        lengths="dataset",  # one program for all batches
        cache_rows=config.data.cache_rows, process_index=shard[0], process_count=shard[1],
    )  # fmt: skip
    _check_rows(source, suite, policy, options)
    loader = Loader(source, policy.processor, options)
    name = name_evaluation(entry)
    return Evaluation(suite, loader, len(source), name, bind_suite_rewards([suite]))


def evaluate_held_out(config: Config, loader: Loader) -> Evaluation:
    """Returns the evaluation of the rows that were held out of the training data."""
    rows = min(config.eval.rows, len(loader.source))
    return Evaluation(SUITES[config.eval.suite], loader, rows)


def bind_suite_rewards(suites: Sequence[Suite]) -> list[BoundReward]:
    """Returns the rewards that suites ask, whatever the config trains on; each once."""
    chosen = {name: options for suite in suites for name, options in suite.rewards.items()}
    return [bind_reward(name, options) for name, options in chosen.items()]


def _count_room(config: Config, policy: PolicyFiles, tasks: Sequence[str]) -> int:
    """Returns the most tokens of a prompt that leave room for a completion of any task."""
    limits = policy.family.limits(policy.sizes)
    # Prompts of images that are cut always leave room for one.
    image = 0 if limits.images_always_fit else limits.image_tokens
    lengths = {TEXT: config.rollout.max_new_tokens, CODES: image}
    completions = [lengths[turn.segments[-1]] for task in tasks for turn in TASKS[task].turns]
    return limits.positions - max(completions)


def _check_rows(source: Source, suite: Suite, policy: PolicyFiles, options: LoaderOptions) -> None:
    """Reads every row once. Raises: InputError listing rows that cannot be sampled or scored."""
    problems, rows = Problems(), UsableRows(source, policy.processor, options)
    names = [source.where(row) for row in range(len(source))]
    for row, name in enumerate(names):
        try:
            rows.read_example(row)
        except (BadRow, InputError) as error:
            problems.add(f"{name}: {error}")
    if suite.find_row_problems is not None:
        columns = {name: source.column(name) for name in suite.columns if name != IMAGE_COLUMN}
        problems.add(suite.find_row_problems(columns, names))
    problems.raise_any()
