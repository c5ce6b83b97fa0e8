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
from corl_jax.config.schema import Config
from corl_jax.data.dataset import Loader
from corl_jax.devices import batches
from corl_jax.devices.mesh import find_layout_problems, make_mesh
from corl_jax.errors import InputError, Problems
from corl_jax.evaluation import SUITES
from corl_jax.models.lora import Lora
from corl_jax.nearest import nearest_multiples, suggest_name
from corl_jax.params import partition
from corl_jax.policies import PolicyFiles, inspect_policy
from corl_jax.policies.family import Family, Limits, Processor
from corl_jax.policies.generation_config import read_generation
from corl_jax.rewards import networks, registry
from corl_jax.runs.directory import RunDir
from corl_jax.runs.export_record import list_place_problems
from corl_jax.tasks import TASKS
from corl_jax.train import attending
from corl_jax.train.loaders import count_steps, make_loaders, open_sources
from corl_jax.train.stages import STAGES, Stage
from corl_jax.types import Params, Sizes
from corl_jax.weights.export import check_export


@dataclasses.dataclass(frozen=True)
class RunOutline:
    """What a run's jitted functions depend on: sizes and options, no file and no array."""

    config: Config
    family: Family
    sizes: Sizes  # with the adapters that the config asks for
    special: Any  # ids of the processor's special tokens
    mesh: Mesh  # of devices present, or of a described topology
    tasks: tuple[str, ...]
    steps: int

    @property
    def stage(self) -> Stage:
        return STAGES[self.config.stage]

    @property
    def limits(self) -> Limits:
        return self.family.limits(self.sizes)

    @property
    def trained(self) -> Sequence[str]:
        """Regexes of the paths of the trained parameters."""
        return trained_patterns(self.config, self.family)

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
    eval_loader: Loader | None


def trained_patterns(config: Config, family: Family) -> Sequence[str]:
    """Returns the regexes of the trained parameters: the adapters, or those of the config."""
    if config.lora.rank and family.adapters is not None:
        return [family.adapters.paths]
    chosen = config.train.trainable
    return family.trainable if chosen is None else chosen


def outline_run(
    config: Config, family: Family, sizes: Sizes, special: Any, devices: list | None = None
) -> RunOutline:
    """Returns the outline of a config for a model of known sizes, without data and weights.

    `devices` are those of the mesh, which need not be present; None takes those that are.
    Without data a run's length is train.max_steps or 1; only the learning rate depends on it.

    Raises:
        InputError: mesh, batch, lengths or trained parameters do not fit one another.
    """
    problems = Problems()
    problems.add(find_unknown_names(config))
    mesh = problems.attempt(
        make_mesh, config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices
    )
    sizes = problems.attempt(add_adapters, config, family, sizes) or sizes
    if mesh:
        problems.add(find_batch_problems(config, mesh))
        problems.add(find_mesh_problems(family, sizes, mesh))
        problems.add(attending.find_kernel_problems(config, family.limits(sizes).head_dim, mesh))
    problems.add(find_trainable_problems(config, family, sizes))
    problems.add(find_length_problems(config, family.limits(sizes)))
    problems.raise_any()
    assert mesh
    tasks = STAGES[config.stage].tasks(config)
    return RunOutline(config, family, sizes, special, mesh, tasks, config.train.max_steps or 1)


def resolve_run(config: Config) -> ResolvedRun:
    """Reads and checks everything but the weights' values.

    Raises:
        InputError: all problems found in the model directory, the data, rewards and mesh.
    """
    problems, stage = Problems(), STAGES[config.stage]
    unknown = find_unknown_names(config)
    problems.add(unknown)
    model = problems.attempt(_inspect_model, config.model.path)
    rewards = problems.attempt(registry.bind_rewards, config.scored_rewards, config.compat)
    bound_rewards = [reward for of_task in (rewards or {}).values() for reward in of_task]
    checked_networks: list[networks.CheckedNetwork] | None = []
    if rewards is not None:  # without the rewards nobody can say which networks they ask
        checked_networks = problems.attempt(_inspect_networks, config, bound_rewards)
        problems.add(_find_reward_problems(config, stage, rewards))
    sources = None
    if not unknown:  # the suite says which columns are read
        sources = problems.attempt(open_sources, config, stage, rewards or {})
    mesh = problems.attempt(make_mesh, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shard = problems.attempt(batches.process_shard, mesh) if mesh else None
    if mesh:
        problems.add(find_batch_problems(config, mesh))
        problems.add(_find_scorer_problems(checked_networks or [], mesh))
    sizes = loaders = None
    if model:
        problems.add(find_missing_abilities(config, stage, model.family, bound_rewards))
        problems.add(_find_answer_problems(config, bound_rewards, model))
        # Without adapters if they are wrong, so that the other checks still run.
        sizes = problems.attempt(add_adapters, config, model.family, model.sizes) or model.sizes
        problems.add(_find_model_problems(config, model.family, sizes, mesh))
        if sources:
            loaders = problems.attempt(
                make_loaders,
                config,
                stage,
                model.processor,
                shard or (0, 1),
                bound_rewards,
                sources,
            )
    problems.raise_any()
    assert model and mesh and loaders and rewards is not None
    train_loader, eval_loader = loaders
    return ResolvedRun(
        config=config, family=model.family, sizes=sizes, special=model.processor.special,
        mesh=mesh, tasks=stage.tasks(config), steps=count_steps(config, train_loader),
        model_dir=model.folder, processor=model.processor, rewards=rewards,
        networks=checked_networks or [], train_loader=train_loader, eval_loader=eval_loader,
    )  # fmt: skip


def find_unknown_names(config: Config) -> list[str]:
    """Returns the names of the config that are not rows of their tables."""
    chosen = (
        ("algorithm.name", config.algorithm.name, RECIPES),
        ("eval.suite", config.eval.suite, ("none", *SUITES)),
    )
    return [
        f"{key}: found {name!r}; {suggest_name(name, names)}"
        for key, name, names in chosen
        if name not in names
    ]


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


def add_adapters(config: Config, family: Family, sizes: Sizes) -> Sizes:
    """Returns the sizes with the adapters that the config asks for.

    Raises:
        InputError: a projection that the family does not adapt.
    """
    options = config.lora
    if not options.rank:
        return sizes
    if family.adapters is None:
        raise InputError(
            f"lora.rank: found {options.rank}, but the model is a {family.name}, which has no "
            "adapters; set it to 0"
        )
    known = family.adapters.targets
    targets = known if options.targets is None else tuple(options.targets)
    unknown = [name for name in targets if name not in known]
    if unknown or not targets or len(set(targets)) < len(targets):
        raise InputError(
            f"lora.targets: found {list(targets)}, expected one or more of {', '.join(known)}, "
            "each once"
        )
    return family.adapters.add(sizes, Lora(options.rank, options.alpha, targets))


def find_missing_abilities(
    config: Config, stage: Stage, family: Family, rewards: Sequence[registry.BoundReward]
) -> list[str]:
    """Returns the abilities that the run needs and the model's family lacks."""
    problems = [
        f"algorithm.tasks: {task} needs segments of {' and '.join(TASKS[task].turn.segments)}, "
        f"which a {family.name} does not make; choose another task or model"
        for task in stage.tasks(config)
        if TASKS[task].turn.segments not in family.turns
    ]
    if not stage.uses_language_model and family.tokenizer_loss is None:
        problems.append(
            f"stage: found {config.stage}, but a {family.name} has no image tokenizer to train; "
            "choose another stage"
        )
    return problems + [
        f"rewards: {reward.name} reads hidden states, which a {family.name} does not give; "
        "remove it, or set its option scorer to another model"
        for reward in rewards
        if family.hidden_states is None
        and reward.row.reads_hidden_states
        and {"policy", "initial"} & set(reward.scorers)
    ]


def _find_reward_problems(config: Config, stage: Stage, rewards: Mapping[str, list]) -> list[str]:
    """Returns tasks without a reward, and rewards without a task."""
    if not stage.samples:
        return []
    tasks, chosen = stage.tasks(config), config.algorithm.tasks
    problems = [
        f"rewards: none is for {task}, which algorithm.tasks {chosen} trains; add one, or set "
        "algorithm.tasks to the other task"
        for task in tasks
        if not rewards.get(task)
    ]
    return problems + [
        f"rewards: {reward.name} is for {task}, which algorithm.tasks {chosen} leaves out; "
        "remove it"
        for task, of_task in rewards.items()
        if task not in tasks
        for reward in of_task
    ]


def find_batch_problems(config: Config, mesh: Mesh) -> list[str]:
    """Returns the batch sizes that the mesh does not divide."""
    shards, batch = batches.num_batch_shards(mesh), config.train.prompts_per_step
    sizes = {
        "train.prompts_per_step": batch,
        "train.micro_batch": config.train.micro_batch or batch,
        "rollout.batch_prompts": config.rollout.batch_prompts or batch,
        "eval.batch_prompts": config.eval.batch_prompts if config.eval.suite != "none" else shards,
    }
    return [
        f"{name}: {size} is not a multiple of the {shards} ways that mesh data x fsdp splits "
        f"prompts; nearest: {nearest_multiples(shards, size)}"
        for name, size in sizes.items()
        if size % shards
    ]


def find_mesh_problems(family: Family, sizes: Sizes, mesh: Any) -> list[str]:
    """Returns the sizes of a model that the mesh does not divide."""
    heads = family.limits(sizes).sharded_heads
    return find_layout_problems(family.abstract(sizes), heads, mesh, family.rules)


def _find_scorer_problems(
    checked_networks: Sequence[networks.CheckedNetwork], mesh: Mesh
) -> list[str]:
    problems = []
    for network in checked_networks:
        if network.policy:
            where = f"rewards: option scorer of {', '.join(network.rewards)}: {network.name}"
            lines = find_mesh_problems(network.policy.family, network.policy.sizes, mesh)
            problems += [f"{where}: {line}" for line in lines]
    return problems


def _find_model_problems(
    config: Config, family: Family, sizes: Sizes, mesh: Mesh | None
) -> list[str]:
    """Returns the sizes and parts of the model that do not fit the config."""
    limits = family.limits(sizes)
    problems = find_trainable_problems(config, family, sizes)
    problems += find_length_problems(config, limits) + _find_export_problems(config, family, sizes)
    if mesh is None:
        return problems
    problems += find_mesh_problems(family, sizes, mesh)
    return problems + attending.find_kernel_problems(config, limits.head_dim, mesh)


def find_length_problems(config: Config, limits: Limits) -> list[str]:
    """Returns a problem if prompts and completions may pass the model's positions."""
    stage = STAGES[config.stage]
    if not stage.uses_language_model:
        return []
    answer = config.rollout.max_new_tokens if stage.samples else 0
    longest = config.data.max_prompt_length + max(answer, limits.image_tokens)
    if longest <= limits.positions:
        return []
    return [
        f"data.max_prompt_length: {config.data.max_prompt_length} plus a completion is {longest} "
        f"tokens; the model has positions for {limits.positions}"
    ]


def _find_answer_problems(
    config: Config, bound_rewards: list[registry.BoundReward], model: PolicyFiles
) -> list[str]:
    """Returns rewards whose prompts to the policy would be longer than its positions."""
    return [
        line
        for reward in bound_rewards
        if {"policy", "initial"} & set(reward.scorers)
        for line in networks.find_position_problems(
            reward, model.family.limits(model.sizes), model.processor,
            config.data.max_prompt_length,
        )
    ]  # fmt: skip


def _find_export_problems(config: Config, family: Family, sizes: Sizes) -> list[str]:
    """Returns what would make the export fail."""
    # Checked before the training, because the export is written after it.
    layout = config.export.layout
    problems = []
    if layout != "none":
        problems += list_place_problems(RunDir(Path(config.output_dir)).export)
        try:
            check_export(family.kind, layout, family.base(sizes))
        except InputError as error:
            problems += [f"export: {problem}" for problem in error.problems]
    return problems


def find_trainable_problems(config: Config, family: Family, sizes: Sizes) -> list[str]:
    """Returns problems of train.trainable: patterns without a match, parts without a gradient."""
    if config.lora.rank and family.lora_of(sizes) is None:
        return []  # add_adapters has said why there are none
    try:
        trained, _ = partition(family.abstract(sizes), trained_patterns(config, family))
    except InputError as error:
        return list(error.problems)
    return _find_gradient_problems(config, family.tokenizer_parts, trained)


def _find_gradient_problems(config: Config, tokenizer: Sequence[str], trained: Params) -> list[str]:
    """Returns problems with trained parts that the stage gives no gradient."""
    if STAGES[config.stage].uses_language_model:
        without = sorted(trained.keys() & set(tokenizer))
        reason = "takes no gradient, so that it would only decay; leave it out"
        through = "through which stage"
    else:
        without = sorted(trained.keys() - set(tokenizer))
        patterns = ", ".join(f'"{part}/.*"' for part in tokenizer)
        reason = f"does not use; expected [{patterns}] or a part of it"
        through = "which stage"
    if not without:
        return []
    names = ", ".join(without)
    return [f"train.trainable: found {names}, {through} {config.stage} {reason}"]
