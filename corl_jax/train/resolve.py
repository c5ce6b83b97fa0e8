"""From a config to a `ResolvedRun`: all that can be checked before a device is touched.

Files, data, tokenizer, rewards, sizes; every problem is reported. `build` goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from corl_jax.config.checks import check_warmup
from corl_jax.config.schema import Config
from corl_jax.data.columns import ANSWER_COLUMN
from corl_jax.data.dataset import (
    Loader,
    LoaderOptions,
    ParquetSource,
    Source,
    required_columns,
    split_held_out_rows,
)
from corl_jax.devices import batches
from corl_jax.devices.mesh import layout_problems, make_mesh
from corl_jax.errors import InputError
from corl_jax.evaluation import shapes
from corl_jax.models.lora import Lora
from corl_jax.nearest import nearest_multiples
from corl_jax.params import partition
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint.generation import read_generation
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.prompts import Processor
from corl_jax.rewards import networks, registry
from corl_jax.rewards.functions import column_problem
from corl_jax.runs.directory import RunDir
from corl_jax.runs.export_record import place_problems
from corl_jax.startup import inspect_model
from corl_jax.train import attending
from corl_jax.types import Params, SpecialTokens
from corl_jax.weights.files import check_export


@dataclasses.dataclass(frozen=True)
class RunOutline:
    """What a run's jitted functions depend on: sizes and options, no file and no array."""

    config: Config
    model_config: JanusConfig  # with the adapters that the config asks for
    special: SpecialTokens
    mesh: Mesh  # of devices present, or of a described topology
    tasks: tuple[str, ...]
    steps: int

    @property
    def micro_batches(self) -> int:
        train = self.config.train
        return train.prompts_per_step // (train.micro_batch or train.prompts_per_step)

    @property
    def updates_per_step(self) -> int:
        return self.config.algorithm.num_iterations if self.config.stage == "rl" else 1

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.updates_per_step


@dataclasses.dataclass(frozen=True)
class ResolvedRun(RunOutline):
    """A checked config: what `build` needs, read from files and not yet on a device."""

    model_dir: Path
    processor: Processor
    rewards: dict[str, list]
    networks: list[networks.CheckedNetwork]  # that the rewards ask
    train_loader: Loader
    eval_loader: Loader | None


def outline_run(
    config: Config, model: JanusConfig, special: SpecialTokens, devices: list | None = None
) -> RunOutline:
    """The outline of a config for a model of known sizes, with no data and no weights at hand.

    `devices` are those of the mesh, which need not be present; None takes those that are.
    Without data a run's length is train.max_steps or 1; only the learning rate depends on it.

    Raises:
        InputError: mesh, batch, lengths or trained parameters do not fit one another.
    """
    problems: list[str] = []
    mesh = parts = None
    model = _with_adapters(config, model)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        problems += _batch_problems(config, mesh) + mesh_problems(model, mesh)
        problems += attending.problems(config, model, mesh)
    except InputError as error:
        problems += error.problems
    try:
        parts = partition(network.abstract(model), config.trained)
        problems += _trainable_problems(config, parts)
    except InputError as error:
        problems += error.problems
    problems += _size_problems(config, model)
    if problems or mesh is None:
        raise InputError(problems)
    return RunOutline(config, model, special, mesh, _tasks(config), config.train.max_steps or 1)


def resolve_run(config: Config) -> ResolvedRun:
    """Reads and checks everything but the weights' values.

    Raises:
        InputError: all problems found in the model directory, the data, rewards and mesh.
    """
    problems: list[str] = []

    def attempt(function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except InputError as error:
            problems.extend(error.problems)
            return None

    model = attempt(_inspect_model, config.model.path)
    model_config, processor, model_dir = model or (None, None, None)
    rewards = attempt(registry.resolve, config.scored_rewards, config.compat)
    listed = [reward for of_task in (rewards or {}).values() for reward in of_task]
    # Without the rewards nobody can say which networks are asked.
    asked = rewards is not None and attempt(_networks, config, listed)
    tasks = _tasks(config)
    sources = attempt(_sources, config, tasks, rewards or {})
    problems += _task_problems(config, tasks, rewards)
    mesh = attempt(make_mesh, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    share = mesh and attempt(batches.process_shard, mesh)
    problems += _batch_problems(config, mesh) if mesh else []
    if model_config and processor:
        problems += _answer_problems(config, listed, model_config, processor)
        model_config = _with_adapters(config, model_config)
        problems += _model_problems(config, model_config, mesh)
    for found in asked or []:
        if found.janus and mesh:
            where = f"rewards: option scorer of {', '.join(found.rewards)}: {found.name}"
            problems += [f"{where}: {line}" for line in mesh_problems(found.janus, mesh)]
    loaders = (
        processor
        and sources
        and attempt(_loaders, config, processor, tasks, share or (0, 1), listed, *sources)
    )
    if problems:
        raise InputError(problems)
    assert model_config and processor and model_dir and loaders and rewards is not None
    train_loader, eval_loader = loaders
    return ResolvedRun(
        config=config, model_config=model_config, special=processor.special, mesh=mesh,
        tasks=tasks, steps=_steps(config, train_loader), model_dir=model_dir, processor=processor,
        rewards=rewards, networks=asked or [], train_loader=train_loader, eval_loader=eval_loader,
    )  # fmt: skip


def _inspect_model(path: str) -> tuple[JanusConfig, Processor, Path]:
    found = inspect_model(path)
    read_generation(found[2])  # the export hands its values on
    return found


def _steps(config: Config, loader: Loader) -> int:
    epochs = config.train.epochs * len(loader.source) / config.train.prompts_per_step
    return config.train.max_steps or max(1, round(epochs))


def _tasks(config: Config) -> tuple[str, ...]:
    if config.stage == "vq":
        return ()
    if config.stage == "sft":
        return ("t2i", "mm2t")
    return {"unified": ("t2i", "mm2t")}.get(config.algorithm.tasks, (config.algorithm.tasks,))


def _with_adapters(config: Config, model: JanusConfig) -> JanusConfig:
    lora = config.lora
    if not lora.rank:
        return model
    return network.adapted(model, Lora(lora.rank, lora.alpha, tuple(lora.targets)))


def _task_problems(config: Config, tasks: tuple[str, ...], rewards: dict | None) -> list[str]:
    if config.stage != "rl" or rewards is None:
        return []
    problems = [
        f"rewards: none is for {task}, which algorithm.tasks {config.algorithm.tasks} trains; "
        f"add one, or set algorithm.tasks to the other task"
        for task in tasks
        if not rewards.get(task)
    ]
    return problems + [
        f"rewards: {reward.name} is for {task}, which algorithm.tasks "
        f"{config.algorithm.tasks} leaves out; remove it"
        for task, listed in rewards.items()
        if task not in tasks
        for reward in listed
    ]


def _batch_problems(config: Config, mesh: Mesh) -> list[str]:
    ways = batches.num_batch_shards(mesh)
    batch = config.train.prompts_per_step
    sizes = {
        "train.prompts_per_step": batch,
        "train.micro_batch": config.train.micro_batch or batch,
        "rollout.batch_prompts": config.rollout.batch_prompts or batch,
        "eval.batch_prompts": config.eval.batch_prompts if config.eval.suite != "none" else ways,
    }
    return [
        f"{name}: {size} is not a multiple of the {ways} ways that mesh data x fsdp splits "
        f"prompts; nearest: {nearest_multiples(ways, size)}"
        for name, size in sizes.items()
        if size % ways
    ]


def mesh_problems(model: JanusConfig, mesh: Any) -> list[str]:
    """What of a network's sizes the mesh does not divide."""
    heads = {
        "heads of language_model": model.llama.num_heads,
        "key heads of language_model": model.llama.num_kv_heads,
        "heads of vision_model": model.siglip.num_heads,
    }
    return layout_problems(network.abstract(model), heads, mesh)


def _model_problems(config: Config, model: JanusConfig, mesh: Mesh | None) -> list[str]:
    """What of the model's sizes and parts does not fit the config."""
    try:
        problems = _trainable_problems(config, partition(network.abstract(model), config.trained))
    except InputError as error:
        problems = list(error.problems)
    problems += _size_problems(config, model)
    problems += _export_problems(config, model)
    if mesh is None:
        return problems
    return problems + mesh_problems(model, mesh) + attending.problems(config, model, mesh)


def _size_problems(config: Config, model: JanusConfig) -> list[str]:
    if config.stage == "vq":
        return []
    answer = config.rollout.max_new_tokens if config.stage == "rl" else 0
    longest = config.data.max_prompt_length + max(answer, model.num_image_tokens)
    limit = model.llama.max_position_embeddings
    if longest <= limit:
        return []
    return [
        f"data.max_prompt_length: {config.data.max_prompt_length} plus a completion is {longest} "
        f"tokens; the model has positions for {limit}"
    ]


def _networks(config: Config, listed: list[registry.BoundReward]) -> list[networks.CheckedNetwork]:
    return networks.inspect(
        listed, config.networks, config.model.dtype, longest_prompt=config.data.max_prompt_length
    )


def _answer_problems(
    config: Config, listed: list[registry.BoundReward], model: JanusConfig, processor: Processor
) -> list[str]:
    """Answers of the policy to rewards, or of its first state, that would pass its positions."""
    return [
        line
        for reward in listed
        if {"policy", "initial"} & set(reward.scorers)
        for line in networks.position_problems(
            reward, model, processor, config.data.max_prompt_length
        )
    ]


def _export_problems(config: Config, model: JanusConfig) -> list[str]:
    """What would stop the export, which is written only when all the training is done."""
    layout = config.export.layout
    problems = []
    if layout != "none":
        problems += place_problems(RunDir(Path(config.output_dir)).export)
        try:
            check_export(layout, network.base(model))
        except InputError as error:
            problems += [f"export: {problem}" for problem in error.problems]
    return problems


def _trainable_problems(config: Config, parts: tuple[Params, Params]) -> list[str]:
    if config.stage != "vq" and "vqmodel" in parts[0]:
        return [
            f"train.trainable: found vqmodel, through which stage {config.stage} takes no "
            "gradient, so that it would only decay; leave it out"
        ]
    idle = sorted(parts[0].keys() - {"vqmodel"})
    if config.stage != "vq" or not idle:
        return []
    return [
        f"train.trainable: found {', '.join(idle)}, which stage vq does not use; "
        'expected ["vqmodel/.*"] or a part of it'
    ]


def _sources(config: Config, tasks: tuple[str, ...], rewards: dict) -> tuple[Source, Source | None]:
    """(rows to train on, held-out rows), with every column that something will read.

    Raises:
        InputError: unreadable files, and the columns that are missing.
    """
    listed = [reward for of_task in rewards.values() for reward in of_task]
    names = {*required_columns(tasks), *_target_columns(config)}
    names |= {column for reward in listed for column in reward.entry.columns}

    def opened(path: Any, more: Sequence[str] = ()) -> Source:
        required = sorted({*names, *more})
        source = ParquetSource(path, columns=config.data.columns, required=required)
        problems = registry.missing_columns(listed, source.names)
        if problems:
            raise InputError(problems)
        return source

    if config.eval.suite == "none":
        return opened(config.data.path), None
    measured = (*shapes.REQUIRED, "real_image") if config.eval.suite == "shapes" else ()
    if config.eval.path is not None:
        return opened(config.data.path), opened(config.eval.path, measured)
    return split_held_out_rows(opened(config.data.path, measured), config.eval.rows)


def _loaders(
    config: Config,
    processor: Processor,
    tasks: tuple[str, ...],
    share: tuple[int, int],
    rewards: list[registry.BoundReward],
    trained: Source,
    held: Source | None,
) -> tuple[Loader, Loader | None]:
    data = config.data
    common: dict[str, Any] = {
        "seed": config.seed,
        "max_prompt_length": data.max_prompt_length,
        "max_bad_fraction": data.max_bad_fraction,
        "cache_rows": data.cache_rows,
        "readable": _readable(config, rewards),
        "process_index": share[0],
        "process_count": share[1],
    }
    options = LoaderOptions(
        tasks=tasks, batch_size=config.train.prompts_per_step, required=_target_columns(config),
        **common,
    )  # fmt: skip
    train = Loader(trained, processor, options)
    train.check()
    check_warmup(config, _steps(config, train))
    if held is None:
        return train, None
    measured = shapes.TASKS if config.eval.suite == "shapes" else tasks
    batch = config.eval.batch_prompts
    options = LoaderOptions(tasks=measured, batch_size=batch, shuffle=False, **common)
    return train, Loader(held, processor, options)


def _readable(
    config: Config, rewards: list[registry.BoundReward]
) -> dict[str, Callable[[Any], str | None]]:
    """Checks of the columns that the stage and our own rewards read; pictures have theirs."""
    read = set(_target_columns(config))
    for reward in rewards:
        if reward.name in registry.REGISTRY:  # a user's own takes what it likes
            entry = reward.entry
            read |= {*entry.columns, *entry.either, *entry.optional}
    names = sorted(read - {"real_image"})
    return {name: functools.partial(column_problem, name) for name in names}


def _target_columns(config: Config) -> list[str]:
    """Columns that the stage learns from, in which a row must not be null."""
    sft = config.sft
    if config.stage == "rl":
        return []
    if config.stage == "vq":
        return ["real_image"]
    captions = [sft.caption_column] if sft.caption_column else []
    return ["real_image", ANSWER_COLUMN, *captions]
