"""Resolves a config: everything that can be checked before a device is touched.

Files, data, tokenizer, rewards and sizes are read and compared; every problem is reported.
`build` goes on from the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config.origins import Origin
from corl_jax.config.schema import Algorithm, Config
from corl_jax.data.dataset import Loader
from corl_jax.devices import batches
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import Problems
from corl_jax.evaluation import SUITES
from corl_jax.nearest import suggest_name
from corl_jax.policies import PolicyFiles, inspect_policy
from corl_jax.policies.family import Family, Limits
from corl_jax.policies.generation_config import read_generation
from corl_jax.policies.processor import Processor
from corl_jax.rewards import networks, registry
from corl_jax.tasks import TASKS, choose_tasks_of_step
from corl_jax.train import attending, fit
from corl_jax.train.evaluations import (
    Evaluation,
    bind_suite_rewards,
    evaluate_held_out,
    find_entry_problems,
    open_evaluations,
)
from corl_jax.train.loaders import count_steps, make_loaders, open_sources
from corl_jax.train.recipe_options import (
    complete_algorithm,
    find_algorithm_problems,
    find_denoising_problems,
    find_ignored_options,
    find_unread_options,
)
from corl_jax.train.stages import STAGES, Stage, list_suites, scores_rewards
from corl_jax.types import Sizes


@dataclasses.dataclass(frozen=True)
class RunOutline:
    """What a run's jitted functions depend on: sizes and options, no file and no array."""

    config: Config
    family: Family
    sizes: Sizes  # with the adapters that the config asks for
    special: Any  # ids of the processor's special tokens
    image: Any  # how the processor normalises images
    mesh: Mesh  # of devices present, or of a described topology
    tasks: tuple[str, ...]
    steps: int

    @property
    def stage(self) -> Stage:
        return STAGES[self.config.stage]

    @property
    def algorithm(self) -> Algorithm:
        """The block `algorithm`, completed by its recipe."""
        return complete_algorithm(self.config.algorithm)

    @property
    def limits(self) -> Limits:
        return self.family.limits(self.sizes)

    @property
    def trained(self) -> Sequence[str]:
        """Regexes of the paths of the trained parameters."""
        return fit.trained_patterns(self.config, self.family)

    @property
    def micro_batches(self) -> int:
        train = self.config.train
        return train.prompts_per_step // (train.micro_batch or train.prompts_per_step)

    @property
    def updates_per_step(self) -> int:
        return self.stage.updates_per_step(self.config)

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.updates_per_step


@dataclasses.dataclass(frozen=True)
class ResolvedRun(RunOutline):
    """A checked config: what `build` needs, read from files and not yet on a device."""

    model_dir: Path
    processor: Processor
    rewards: Mapping[str, list]
    networks: list[networks.CheckedNetwork]  # that the rewards ask
    train_loader: Loader
    evaluations: tuple[Evaluation, ...]
    warnings: list[str]  # settings without effect that only the tables beside the config tell
    origin: Origin | None = None  # what the config was made from


def outline_run(
    config: Config, family: Family, sizes: Sizes, special: Any, devices: list | None = None
) -> RunOutline:
    """Returns the outline of a config for a model of known sizes, without data and weights.

    `devices` are those of the mesh, which need not be present; None takes those that are.
    Without data a run's length is train.max_steps or 1; only the learning rate depends on it.

    Raises:
        InputError: mesh, batch, lengths, trained parameters or options do not fit.
    """
    problems, stage = Problems(), STAGES[config.stage]
    config = fit.choose_guidance(config, family)
    problems.add(find_table_problems(config, family))
    missing = find_missing_abilities(config, stage, family, sizes)
    problems.add([*missing, *find_denoising_problems(config, stage, family, sizes)])
    problems.add(fit.find_drawing_problems(config, family, family.limits(sizes)))
    axes = config.mesh
    mesh = problems.attempt(make_mesh, axes.data, axes.fsdp, axes.tensor, devices)
    sizes = problems.attempt(fit.add_parts, config, family, sizes) or sizes
    if mesh:
        problems.add(fit.find_batch_problems(config, mesh))
        problems.add(fit.find_mesh_problems(family, sizes, mesh))
        problems.add(attending.find_kernel_problems(config, family.limits(sizes).head_dim, mesh))
    problems.add(fit.find_trainable_problems(config, family, sizes))
    problems.add(fit.find_length_problems(config, family.limits(sizes)))
    problems.raise_any()
    assert mesh
    return RunOutline(
        config, family, sizes, special, family.stand_in_image(sizes), mesh, stage.tasks(config),
        config.train.max_steps or 1,
    )  # fmt: skip


def resolve_run(config: Config, origin: Origin | None = None) -> ResolvedRun:
    """Reads and checks everything but the weights' values.

    Raises:
        InputError: all problems found in the model directory, the data, rewards and mesh.
    """
    problems, stage = Problems(), STAGES[config.stage]
    model = problems.attempt(_inspect_model, config.model.path)
    problems.add(find_table_problems(config, model.family if model else None))
    problems.add(_find_suite_problems(config, stage))
    rewards = _resolve_rewards(config, stage, problems)
    sources = sizes = loaders = evaluations = None
    if _knows_columns(config):
        sources = problems.attempt(open_sources, config, stage, rewards.by_task)
    mesh = problems.attempt(make_mesh, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shard = problems.attempt(batches.process_shard, mesh) if mesh else None
    if mesh:
        problems.add(fit.find_batch_problems(config, mesh))
        problems.add(_find_scorer_problems(rewards.networks, mesh))
    if model:
        config = fit.choose_guidance(fit.choose_layout(config, model.family), model.family)
        missing = find_missing_abilities(config, stage, model.family, model.sizes)
        problems.add([*missing, *_find_own_scorer_problems(config, rewards.used, model)])
        problems.add(find_denoising_problems(config, stage, model.family, model.sizes))
        problems.add(fit.find_replaced_models(config, model, rewards.networks))
        # Without adapters if they are wrong, so that the other checks still run.
        sizes = problems.attempt(fit.add_parts, config, model.family, model.sizes) or model.sizes
        problems.add(fit.find_model_problems(config, model.family, sizes, mesh))
        if sources and not missing:  # prompts are encoded, and the model must know their kind
            loaders = problems.attempt(
                make_loaders, config, stage, model.processor, shard or (0, 1), rewards.used, sources
            )
            evaluations = problems.attempt(
                open_evaluations, config, stage, model, shard or (0, 1), rewards.used
            )
    problems.raise_any()
    assert model and mesh and loaders and evaluations is not None
    train_loader, held_out = loaders
    if held_out is not None:
        evaluations = [evaluate_held_out(config, held_out), *evaluations]
    return ResolvedRun(
        config=config, family=model.family, sizes=sizes, special=model.processor.special,
        image=model.processor.image, mesh=mesh, tasks=stage.tasks(config),
        steps=count_steps(config, train_loader),
        model_dir=model.folder, processor=model.processor, rewards=rewards.by_task, origin=origin,
        networks=rewards.networks, train_loader=train_loader, evaluations=tuple(evaluations),
        warnings=[*rewards.warnings, *find_ignored_options(config),
                  *find_unread_options(config, model.family, origin), *find_unlogged_tasks(config)],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ResolvedRewards:
    """The rewards of a config, and the networks that they ask."""

    by_task: Mapping[str, list[registry.BoundReward]]
    used: list[registry.BoundReward]  # those of all tasks, each once
    networks: list[networks.CheckedNetwork]
    warnings: list[str]  # settings without effect


def _resolve_rewards(config: Config, stage: Stage, problems: Problems) -> ResolvedRewards:
    """Binds the rewards and checks their networks; adds what is wrong to the problems."""
    scored_rewards = config.rewards if scores_rewards(config) else []
    bound = problems.attempt(registry.bind_rewards, scored_rewards, config.compat)
    if bound is None:  # without the rewards nobody can say which networks they ask
        return ResolvedRewards({}, [], [], [])
    by_task = registry.group_by_task(bound, stage.tasks(config))
    scored = {reward.name for rewards in by_task.values() for reward in rewards}
    used = [reward for reward in bound if reward.name in scored]
    # A suite's reward may be one of the config with other options: it asks the same networks.
    of_suites = bind_suite_rewards(list_suites(config))
    asking_rewards = [*used, *(reward for reward in of_suites if reward.name not in scored)]
    checked_networks = problems.attempt(_inspect_networks, config, asking_rewards) or []
    problems.add(_find_reward_problems(config, stage, by_task))
    problems.add(_find_buffer_problems(config, used))
    warnings = find_unused_rewards(config, bound, used)
    warnings += networks.find_unused_settings(asking_rewards, config.networks)
    return ResolvedRewards(by_task, used, checked_networks, warnings)


def find_table_problems(config: Config, family: Family | None = None) -> list[str]:
    """Returns names that are not rows of their tables, and options that do not fit a row."""
    chosen = (
        ("algorithm.name", config.algorithm.name, RECIPES),
        ("eval.suite", config.eval.suite, ("none", *SUITES)),
    )
    problems = [
        f"{key}: found {name!r}; {suggest_name(name, names)}"
        for key, name, names in chosen
        if name not in names
    ]
    if config.eval.suite in SUITES and not _knows_columns(config):
        problems.append(
            f"eval.suite: found {config.eval.suite}, which reads files of its own format; list it "
            "in eval.suites, with the path of its file"
        )
    problems += find_entry_problems(config)
    if config.algorithm.name in RECIPES and STAGES[config.stage].compares:
        problems += find_algorithm_problems(config, family)
    return problems


def _inspect_model(path: str) -> PolicyFiles:
    model = inspect_policy(path)
    read_generation(model.folder)  # the export hands its values on
    return model


def _inspect_networks(
    config: Config, bound_rewards: list[registry.BoundReward]
) -> list[networks.CheckedNetwork]:
    return networks.check_networks(
        bound_rewards,
        config.networks,
        config.model.dtype,
        longest_prompt=config.data.max_prompt_length,
    )


def find_missing_abilities(
    config: Config, stage: Stage, family: Family, sizes: Sizes | None = None
) -> list[str]:
    """Returns the abilities that tasks and stage need and the model lacks."""
    problems = []
    for task in stage.tasks(config):
        lack = family.find_lack(TASKS[task], sizes)
        program = family.turns.get(TASKS[task].turn_kinds)
        if lack:
            problems.append(
                f"stage {config.stage}: the task {task} {lack}; choose another task or model"
            )
        elif stage.straight_through(config) and program and not program.passes_gradients:
            problems.append(
                f"stage: found {config.stage}, but a {family.name} has no image decoder that lets "
                "gradients through; choose stage self_sft, which needs none"
            )
    if not stage.uses_language_model and family.tokenizer_loss is None:
        problems.append(
            f"stage: found {config.stage}, but a {family.name} has no image tokenizer to train; "
            "choose another stage"
        )
    return problems


def _find_suite_problems(config: Config, stage: Stage) -> list[str]:
    """Returns a problem if the suite scores rewards and there are none to score."""
    if stage.uses_language_model and config.rewards:
        return []
    reason = "the config lists none"
    if not stage.uses_language_model:
        reason = f"stage {config.stage} samples nothing"
    chosen = {f"eval.suites.{i}.suite": entry.suite for i, entry in enumerate(config.eval.suites)}
    return [
        f"{key}: found {name}, which scores rewards, but {reason}; list rewards or choose another "
        "suite"
        for key, name in {"eval.suite": config.eval.suite, **chosen}.items()
        if name in SUITES and SUITES[name].uses_rewards
    ]


def _knows_columns(config: Config) -> bool:
    """Returns whether `eval.suite` says which columns of the data it reads."""
    return config.eval.suite == "none" or (
        config.eval.suite in SUITES and SUITES[config.eval.suite].open_rows is None
    )


def _find_reward_problems(config: Config, stage: Stage, rewards: Mapping[str, list]) -> list[str]:
    """Returns the tasks without a reward that trains them."""
    chosen = config.algorithm.tasks
    return [
        f"rewards: none scores the {' or '.join(TASKS[task].results)} of {task}, which "
        f"algorithm.tasks {chosen} trains{_explain_weights(of_task)}; add one, or choose other "
        "tasks"
        for task, of_task in rewards.items()
        if stage.samples and not any(reward.weight for reward in of_task)
    ]


def _explain_weights(rewards: Sequence[registry.BoundReward]) -> str:
    names = ", ".join(reward.name for reward in rewards)
    return f", with a weight other than 0: {names} is only logged" if names else ""


def _find_buffer_problems(config: Config, used: Sequence[registry.BoundReward]) -> list[str]:
    """Returns the rewards of lengths whose buffer is longer than the longest answer of the run."""
    longest = config.rollout.max_new_tokens
    return [
        f"rewards: {reward.name}: option buffer: found {buffer}; expected at most "
        f"rollout.max_new_tokens, which is {longest}"
        for reward in used
        if reward.row.reads_lengths and reward.options["max_tokens"] is None
        # null: a fifth of the longest answer
        if (buffer := reward.options["buffer"] or 0) > longest
    ]


def find_unused_rewards(
    config: Config,
    bound: Sequence[registry.BoundReward],
    used: Sequence[registry.BoundReward],
) -> list[str]:
    """Returns a warning for each reward that nothing in this run reads."""
    warnings, names = [], {reward.name for reward in used}
    if config.rewards and not scores_rewards(config):
        labels = ", ".join(reward.label for reward in config.rewards)
        warnings.append(
            f"rewards: {labels}: no effect; only stage rl or an eval.suite that scores rewards "
            "reads them"
        )
    warnings += [
        f"rewards: {reward.name} has no effect; only a task that makes {reward.row.scores} reads it"
        for reward in bound
        if reward.name not in names
    ]
    return warnings


def find_unlogged_tasks(config: Config) -> list[str]:
    """Returns a warning for each task that is trained but in no step of the log."""
    tasks, every = STAGES[config.stage].tasks(config), config.algorithm.alternate_every
    if not every or len(tasks) < 2 or not STAGES[config.stage].compares:
        return []
    # Both schedules repeat after so many steps.
    steps = range(config.log.every, 1 + config.log.every * every * len(tasks), config.log.every)
    logged = {task for step in steps for task in choose_tasks_of_step(tasks, every, step - 1)}
    return [
        f"log.every: with {config.log.every} and algorithm.alternate_every {every} no step of "
        f"{task} is logged, but for the last of the run; choose an odd number of steps"
        for task in tasks
        if task not in logged
    ]


def _find_scorer_problems(
    checked_networks: Sequence[networks.CheckedNetwork], mesh: Mesh
) -> list[str]:
    problems = []
    for network in checked_networks:
        if network.policy:
            where = f"rewards: option scorer of {', '.join(network.rewards)}: {network.name}"
            lines = fit.find_mesh_problems(network.policy.family, network.policy.sizes, mesh)
            problems += [f"{where}: {line}" for line in lines]
    return problems


def _find_own_scorer_problems(
    config: Config, bound_rewards: list[registry.BoundReward], model: PolicyFiles
) -> list[str]:
    """Returns rewards that need of the policy what it lacks."""
    return [
        line
        for reward in bound_rewards
        if {"policy", "initial"} & set(reward.scorers)
        for line in networks.find_scorer_problems(reward, model, config.data.max_prompt_length)
    ]
