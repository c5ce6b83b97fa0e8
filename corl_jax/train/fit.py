"""Finds what of a config does not fit its model and its mesh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from corl_jax.atomic_files import check_not_read
from corl_jax.config.readers import has_reader
from corl_jax.config.schema import Config
from corl_jax.devices import batches
from corl_jax.devices.mesh import find_layout_problems
from corl_jax.errors import InputError, Problems
from corl_jax.models.lora import Lora
from corl_jax.nearest import nearest_multiples, suggest_name
from corl_jax.params import leaf_paths, partition
from corl_jax.policies import PolicyFiles
from corl_jax.policies.family import Family, Limits
from corl_jax.rewards.networks import CheckedNetwork
from corl_jax.runs.directory import RunDir
from corl_jax.runs.export_record import list_place_problems
from corl_jax.sampling_options import choose_cfg_scale
from corl_jax.tasks import choose_tasks, image_tasks, plan_tasks
from corl_jax.train import attending, sft
from corl_jax.train.optimizer import is_in_group
from corl_jax.train.stages import STAGES
from corl_jax.types import Params, Sizes
from corl_jax.weights.export import check_export
from corl_jax.weights.parts import list_read_folders


def trained_patterns(config: Config, family: Family) -> Sequence[str]:
    """Returns the regexes of the trained parameters: the adapters, or those of the config."""
    if config.lora.rank and family.adapters is not None:
        return [family.adapters.paths]
    chosen = config.train.trainable
    added = [family.alignment.paths] if aligns_images(config) and family.alignment else []
    return [*(family.trainable if chosen is None else chosen), *added]


def aligns_images(config: Config) -> bool:
    """Returns whether the run aligns states of images with an image encoder: sft.repa_weight."""
    stage, tasks = STAGES[config.stage], choose_tasks(config.sft.tasks)
    is_supervised = stage.uses_language_model and not stage.samples
    has_images = bool(image_tasks(tasks)) and sft.choose_image_weight(config) > 0
    return is_supervised and config.sft.repa_weight > 0 and has_images


def choose_layout(config: Config, family: Family) -> Config:
    """Returns the config with the family's usual layout in the place of export.layout auto."""
    if config.export.layout != "auto":
        return config
    export = config.export.model_copy(update={"layout": family.kind.usual_layout})
    return config.model_copy(update={"export": export})


def choose_guidance(config: Config, family: Family) -> Config:
    """Returns the config with the family's own guidance of images where it states none.

    Where nothing reads it, it stays null.
    """
    if config.rollout.cfg_scale is not None or not has_reader(config, "rollout.cfg_scale"):
        return config
    rollout = config.rollout.model_copy(update={"cfg_scale": choose_cfg_scale(None, family)})
    return config.model_copy(update={"rollout": rollout})


def add_parts(config: Config, family: Family, sizes: Sizes) -> Sizes:
    """Returns the sizes with the adapters and the alignment that the config asks for.

    Raises:
        InputError: a projection that the family does not adapt, or an alignment that it lacks.
    """
    options = config.lora
    if aligns_images(config):
        sizes = _add_alignment(config, family, sizes)
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


def _add_alignment(config: Config, family: Family, sizes: Sizes) -> Sizes:
    key, limits = f"sft.repa_weight: found {config.sft.repa_weight:g}", family.limits(sizes)
    if family.alignment is None:
        raise InputError(
            f"{key}, but a {family.name} aligns no images with an image encoder; set it to 0"
        )
    if config.lora.rank:
        raise InputError(
            f"{key}, whose projector adapters do not train; set it to 0, or lora.rank to 0"
        )
    if limits.image_side != limits.input_image_side:
        raise InputError(
            f"{key}, but the model draws images of {limits.image_side} pixels and its encoder "
            f"reads {limits.input_image_side}, so that their places differ; set it to 0"
        )
    return family.alignment.add(sizes)


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


def find_model_problems(
    config: Config, family: Family, sizes: Sizes, mesh: Mesh | None
) -> list[str]:
    """Returns the sizes and parts of the model that do not fit the config."""
    limits = family.limits(sizes)
    problems = find_trainable_problems(config, family, sizes) + find_target_problems(config, family)
    problems += find_length_problems(config, limits) + _find_export_problems(config, family, sizes)
    problems += find_drawing_problems(config, family, limits)
    if mesh is None:
        return problems
    problems += find_mesh_problems(family, sizes, mesh)
    return problems + attending.find_kernel_problems(config, limits.head_dim, mesh)


def find_target_problems(config: Config, family: Family) -> list[str]:
    """Returns the options of supervised training that the family cannot follow."""
    texts = config.sft.text_column
    if not texts or sft.TEXT_PROMPT in family.prompts:
        return []
    return [
        f"sft.text_column: found {texts}, but a {family.name} learns no texts without images; set "
        "it to null"
    ]


def find_length_problems(config: Config, limits: Limits) -> list[str]:
    """Returns a problem if prompts and completions may pass the model's positions."""
    stage = STAGES[config.stage]
    if not stage.uses_language_model:
        return []
    answer = config.rollout.max_new_tokens if stage.samples else 0
    # Prompts of images may be cut; then only those of questions are as long as the data allows.
    completion = answer if limits.images_always_fit else max(answer, limits.image_tokens)
    if plan_tasks(stage.tasks(config)):
        completion = answer + limits.planned_image_tokens
    longest = config.data.max_prompt_length + completion
    if longest <= limits.positions:
        return []
    return [
        f"data.max_prompt_length: {config.data.max_prompt_length} plus a completion is {longest} "
        f"tokens; the model has positions for {limits.positions}"
    ]


def find_drawing_problems(config: Config, family: Family, limits: Limits) -> list[str]:
    """Returns the windows of codes and the scored steps that no image has."""
    problems = find_window_problems(config, family, limits)
    scored, usual = config.unmasking.scored_steps, limits.unmasking_steps
    if usual is None or not has_reader(config, "unmasking.scored_steps"):
        return problems
    steps = config.unmasking.steps or usual
    if scored > steps:
        problems.append(
            f"unmasking.scored_steps: found {scored}, but an image is drawn in {steps} steps; "
            "expected at most as many; lower it, or set it to 0 to score all"
        )
    return problems


def find_window_problems(config: Config, family: Family, limits: Limits) -> list[str]:
    """Returns a problem if images cannot be drawn in windows of so many codes."""
    window = config.rollout.image_window
    if window > 1 and not family.draws_windows:
        return [
            f"rollout.image_window: found {window}, but a {family.name} does not draw the codes of "
            "an image in windows; set it to 1"
        ]
    if window > limits.image_tokens:
        return [
            f"rollout.image_window: found {window}, but an image has {limits.image_tokens} codes; "
            "expected at most as many; lower it"
        ]
    return []


def _find_export_problems(config: Config, family: Family, sizes: Sizes) -> list[str]:
    """Returns what would make the export fail."""
    # Checked before the training, because the export is written after it.
    layout, problems = choose_layout(config, family).export.layout, []
    if layout != "none":
        problems += list_place_problems(RunDir(Path(config.output_dir)).export)
        try:
            check_export(family.kind, layout, family.base(sizes))
        except InputError as error:
            problems += [f"export.layout: {problem}" for problem in error.problems]
    if config.lora.rank and config.export.lora == "adapter" and layout != "transformers":
        problems.append(
            f"export.lora: adapter, but a {family.name} is exported in the layout {layout}; PEFT "
            "loads an adapter onto transformers' model alone: set export.lora to merged"
        )
    return problems


def find_replaced_models(
    config: Config, model: PolicyFiles, checked_networks: Iterable[CheckedNetwork]
) -> list[str]:
    """Returns a problem if the run's export takes the place of the model, or of a scorer."""
    # Also with export.layout none: an older export is moved away, and no resume finds the model.
    folder, problems = RunDir(Path(config.output_dir)).export, Problems()
    scorers = (network.policy for network in checked_networks)
    for files in filter(None, (model, *scorers)):
        read_folders = list_read_folders(files.folder, files.family.kind)
        problems.attempt(check_not_read, folder, read_folders, "output_dir: its export")
    return [*problems]


def find_trainable_problems(config: Config, family: Family, sizes: Sizes) -> list[str]:
    """Returns problems of train.trainable: patterns without a match, parts without a gradient."""
    if config.lora.rank and family.lora_of(sizes) is None:
        return []  # add_parts has said why there are none
    if aligns_images(config) and family.base(sizes) == sizes:
        return []  # the same
    try:
        trained, _ = partition(family.abstract(sizes), trained_patterns(config, family))
    except InputError as error:
        return list(error.problems)
    problems = _find_gradient_problems(config, family.tokenizer_parts, trained)
    return problems + _find_group_problems(config, family, trained)


def _find_group_problems(config: Config, family: Family, trained: Params) -> list[str]:
    """Returns a problem for each learning rate of a group that trains nothing."""
    problems, paths = [], [path for path, _ in leaf_paths(trained)]
    for name in config.optimizer.learning_rates:
        key = f"optimizer.learning_rates.{name}"
        if name not in family.groups:
            nearest = suggest_name(name, family.groups, f"a {family.name} has")
            problems.append(f"{key}: no group of parameters; {nearest}")
        elif not any(is_in_group(path, family.groups[name]) for path in paths):
            problems.append(
                f"{key}: nothing of this group is trained; leave it out, or add its parameters to "
                f"train.trainable: {', '.join(family.groups[name])}"
            )
    return problems


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
