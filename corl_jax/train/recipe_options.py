"""Completes the block `algorithm` of a config by its recipe, and checks the two together."""

from __future__ import annotations

import dataclasses

import numpy as np

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import Sde, check_guard, tabulate_checked
from corl_jax.algorithms.flow.windows import SmallStdError, Window, fit_window
from corl_jax.algorithms.recipes import RECIPES, Recipe
from corl_jax.config.denoising import Denoising
from corl_jax.config.origins import Origin
from corl_jax.config.readers import list_changes
from corl_jax.config.schema import Algorithm, Config
from corl_jax.policies.family import Denoising as SamplerDenoising
from corl_jax.policies.family import Family
from corl_jax.tasks import TASKS, TEXT, choose_tasks
from corl_jax.train.stages import STAGES, Stage
from corl_jax.types import Sizes

KL_ESTIMATORS = {"loss": "k3", "reward": "k1"}
"""Place of the KL penalty -> its estimator where a config moves the penalty of a recipe."""


def complete_algorithm(algorithm: Algorithm) -> Algorithm:
    """Returns the block with the recipe's value for each option that is null."""
    recipe = RECIPES[algorithm.name]
    defaults = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(Recipe)
        if field.name in Algorithm.model_fields
    } | {"scale": recipe.scales[0], "reduction": recipe.reductions[0]}
    if algorithm.kl_in not in (None, recipe.kl_in):
        # k1 has no gradient in the loss, and k2 and k3 have another one than the KL in the reward.
        defaults["kl_estimator"] = KL_ESTIMATORS[algorithm.kl_in]
    missing = {name: x for name, x in defaults.items() if getattr(algorithm, name) is None}
    return algorithm.model_copy(update=missing)


def find_algorithm_problems(config: Config, family: Family | None = None) -> list[str]:
    """Returns the options that the algorithm cannot work with, each with the reason.

    With `family` the remedies name only algorithms that can train models of this family.
    """
    recipe = RECIPES[config.algorithm.name]
    return [
        *_find_batch_problems(config, recipe, family),
        *_find_choice_problems(config.algorithm, recipe),
        *_find_dual_clip_problems(config.algorithm, recipe),
        *_find_weight_problems(config.algorithm),
    ]


def _find_weight_problems(algorithm: Algorithm) -> list[str]:
    """Returns a problem if no segment of any task is in the loss."""
    tasks = [TASKS[name] for name in choose_tasks(algorithm.tasks)]
    last = [algorithm.mm2t_loss_weight if x.segments[-1] == TEXT else 1.0 for x in tasks]
    earlier = [algorithm.earlier_loss_weight for x in tasks if x.has_several_segments]
    if any(last) or any(earlier):
        return []
    return [
        f"algorithm: every loss weight of algorithm.tasks {algorithm.tasks} is 0, so that nothing "
        "is learned; raise mm2t_loss_weight or earlier_loss_weight"
    ]


def _find_batch_problems(config: Config, recipe: Recipe, family: Family | None) -> list[str]:
    algorithm, size = config.algorithm, config.rollout.group_size
    problems = []
    if size < recipe.min_group_size:
        singles = ", ".join(_list_usable_recipes(config, family))
        problems.append(
            f"rollout.group_size: found {size}, but algorithm.name {algorithm.name} compares the "
            f"completions of one prompt; expected at least {recipe.min_group_size}; raise it"
            f"{f', or choose algorithm.name {singles}' if singles else ''}"
        )
    elif size * config.train.prompts_per_step < recipe.min_batch_size:
        problems.append(
            f"train.prompts_per_step: found {config.train.prompts_per_step}, but algorithm.name "
            f"{algorithm.name} compares the completions of a step; expected at least "
            f"{recipe.min_batch_size}; raise it, or raise rollout.group_size"
        )
    # A greedy completion is in the group too, and may differ from the only other one.
    if algorithm.redraws and size + recipe.uses_greedy < 2:
        problems.append(
            f"algorithm.redraws: found {algorithm.redraws}, but with rollout.group_size {size} the "
            "rewards of a group never differ; set it to 0"
        )
    if recipe.max_iterations is not None and algorithm.num_iterations > recipe.max_iterations:
        problems.append(
            f"algorithm.num_iterations: found {algorithm.num_iterations}, but the loss of "
            f"algorithm.name {algorithm.name} has no ratio that corrects for a policy that has "
            f"moved; expected {recipe.max_iterations}"
        )
    return problems


def _list_usable_recipes(config: Config, family: Family | None) -> list[str]:
    """Returns the algorithms that work with the config's other options and the family."""
    usable = []
    for name, recipe in RECIPES.items():
        of_latents = family is not None and _makes_latents(config.algorithm, family)
        if recipe.min_group_size > config.rollout.group_size or (recipe.uses_greedy and of_latents):
            continue
        algorithm = config.algorithm.model_copy(update={"name": name})
        changed = config.model_copy(update={"algorithm": algorithm})
        if find_algorithm_problems(changed, family) or (of_latents and _is_kl_in_reward(algorithm)):
            continue
        usable.append(name)
    return usable


def _makes_latents(algorithm: Algorithm, family: Family) -> bool:
    """Returns whether a task of the algorithm makes images by denoising."""
    tasks = [TASKS[name] for name in choose_tasks(algorithm.tasks)]
    return family.denoises and any(task.makes_image for task in tasks)


def _is_kl_in_reward(algorithm: Algorithm) -> bool:
    return bool(algorithm.kl_coef) and complete_algorithm(algorithm).kl_in == "reward"


def _find_choice_problems(algorithm: Algorithm, recipe: Recipe) -> list[str]:
    choices = (
        ("scale", algorithm.scale, recipe.scales),
        ("reduction", algorithm.reduction, recipe.reductions),
    )
    return [
        f"algorithm.{key}: found {value}, which algorithm.name {algorithm.name} does not have; "
        f"expected {'one of ' if len(offered) > 1 else ''}{', '.join(offered)}"
        for key, value, offered in choices
        if value is not None and value not in offered
    ]


def _find_dual_clip_problems(algorithm: Algorithm, recipe: Recipe) -> list[str]:
    if algorithm.dual_clip is None or "dual_clip" in recipe.ignored:
        return []
    highest = 1 + (recipe.clip_high if algorithm.clip_high is None else algorithm.clip_high)
    if algorithm.dual_clip > highest:
        return []
    return [
        f"algorithm.dual_clip: found {algorithm.dual_clip:g}; expected more than 1 + "
        f"algorithm.clip_high, which is {highest:g}; raise it, or lower algorithm.clip_high"
    ]


def find_ignored_options(config: Config) -> list[str]:
    """Returns a warning for each option of the algorithm that has no effect."""
    recipe = RECIPES[config.algorithm.name]
    warnings = [
        f"algorithm.{key}: {value!r} has no effect; algorithm.name {config.algorithm.name} does "
        "not read it"
        for key, value in list_changes(config.algorithm)
        if key in recipe.ignored
    ]
    algorithm = complete_algorithm(config.algorithm)
    if algorithm.ddof != 1 and algorithm.scale == "none" and "ddof" not in recipe.ignored:
        warnings.append(
            f"algorithm.ddof: {algorithm.ddof} has no effect; only algorithm.scale group or batch "
            "reads it"
        )
    if algorithm.kl_coef and algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        warnings.append(
            "algorithm.kl_estimator: k1 in the loss has a gradient whose mean is 0; choose k2 or "
            "k3, or set algorithm.kl_in to reward"
        )
    return warnings


def find_unread_options(config: Config, family: Family, origin: Origin | None = None) -> list[str]:
    """Returns a warning for each option that models of the run's family do not read.

    With `origin` also for those that were given on top of the files and have their default value.
    """
    if family.denoises:
        unread = (
            "compat.image_logprobs_unshifted",
            "unmasking.",
            "algorithm.image_",
            "sft.released",
            "guards.duplicates",
            *_list_options_of_tokens(config),
        )
        way = "makes images by denoising"
    elif any(program.choose_scored for program in family.turns.values()):
        unread = ("compat.image_logprobs_unshifted", "guards.drift_steps")
        way = "draws the codes of images in any order"
    else:
        unread = ("unmasking.", "guards.drift_steps", "sft.released")
        way = "draws the codes of images in one order"
    changes = {key: value for key, value in list_changes(config) if key != "guards.fatal"}
    if origin is not None:
        # A value of the files that is set back to the default is not meant to have an effect.
        new = origin.overrides.keys() - origin.replaced.keys() - changes.keys()
        changes |= {key: origin.overrides[key] for key in sorted(new) if key != "guards.fatal"}
    # A fatal alarm is an option's name in a value: (option, shown key, value).
    options = [
        *((key, key, value) for key, value in changes.items()),
        *((f"guards.{alarm}", "guards.fatal", alarm) for alarm in config.guards.fatal),
    ]
    return [
        f"{shown}: {value!r} has no effect; a {family.name} {way}"
        for key, shown, value in options
        if key.startswith(unread)
    ]


def _list_options_of_tokens(config: Config) -> tuple[str, ...]:
    """Returns the options that only texts read, if no task of the run makes one."""
    tasks = [TASKS[name] for name in choose_tasks(config.algorithm.tasks)]
    if not STAGES[config.stage].compares or any(task.makes_text or task.has_plan for task in tasks):
        return ()
    learning = (
        "algorithm.kl_estimator", "algorithm.clip_low", "algorithm.clip_high", "guards.entropy",
    )  # fmt: skip
    has_suites = config.eval.suite != "none" or config.eval.suites
    return learning if has_suites else (*learning, "rollout.temperature")


def find_denoising_problems(
    config: Config, stage: Stage, family: Family, sizes: Sizes
) -> list[str]:
    """Returns the options with which a model that makes images by denoising cannot be trained.

    For any other model these are all options of denoising: they were meant for another model.
    """
    if not family.denoises:
        keys = [key for key, _ in list_changes(config) if key.startswith("denoising.")]
        return keys and [
            f"model.path: found a {family.name}, which does not make images by denoising, but the "
            f"config has {', '.join(keys)}; give a model that does, such as a JanusFlow, or leave "
            "the block denoising out"
        ]
    options = config.denoising
    try:
        # Evaluations of every stage draw images at these times.
        tokens = family.limits(sizes).latent_tokens
        sigmas, _ = (
            make_sigmas(options.schedule, steps, options.shift, tokens)
            for steps in (options.steps, options.eval_steps)
        )
    except ValueError as error:
        return [f"denoising: {error}"]
    # An unknown name of an algorithm is a problem already.
    if not stage.compares or config.algorithm.name not in RECIPES:
        return []
    if not _makes_latents(config.algorithm, family):
        return []
    recipe, algorithm, problems = RECIPES[config.algorithm.name], config.algorithm, []
    if recipe.uses_greedy:
        usable = _list_usable_recipes(config, family)
        remedy = f"choose {'one of ' if len(usable) > 1 else ''}{', '.join(usable)}"
        problems.append(
            f"algorithm.name: found {algorithm.name}, which compares with a greedy completion; a "
            f"{family.name} draws no greedy image in the program of its samples; "
            f"{remedy if usable else 'choose another, with rollout.group_size of at least 2'}"
        )
    if _is_kl_in_reward(algorithm):
        problems.append(
            "algorithm.kl_in: found reward, but the divergence of denoising steps is a term of the "
            "loss; set it to loss, or algorithm.kl_coef to 0"
        )
    return problems + _find_noise_problems(options, sigmas)


def _find_noise_problems(options: Denoising, sigmas: np.ndarray) -> list[str]:
    """Returns the options of noisy steps that do not fit each other, or times [T + 1]."""
    sde, problems = choose_sde(options), []
    if sde.is_guarded:
        try:
            check_guard(sde.dynamics)
        except ValueError as error:
            problems.append(f"denoising: {error}; correct denoising.guard or denoising.dynamics")
    try:
        tabulate_checked(sigmas, sde)
    except ValueError as error:
        return [*problems, f"denoising: {error}; correct denoising.noise_level"]
    try:
        fit_window(choose_window(options), sigmas, sde)
    except ValueError as error:
        keys = ["denoising.window", "denoising.window_starts", "denoising.steps"]
        if isinstance(error, SmallStdError):
            is_float32 = sde.latent_dtype == "float32"
            keys.insert(0, "denoising.noise_level" if is_float32 else "denoising.latent_dtype")
        problems.append(f"denoising: {error}; correct {', '.join(keys[:-1])} or {keys[-1]}")
    return problems


def choose_sde(options: Denoising) -> Sde:
    """Returns how training draws and scores the noisy steps of images."""
    return Sde(options.dynamics, options.noise_level, options.guard, options.latent_dtype)


def choose_eval_denoising(options: Denoising, latent_tokens: int | None) -> SamplerDenoising:
    """Returns how evaluations draw images that are made by denoising: without noise."""
    return SamplerDenoising(
        options.eval_steps, options.schedule, options.shift, num_tokens=latent_tokens
    )


def choose_window(options: Denoising) -> Window:
    """Returns the window of the noisy steps that the options describe."""
    return Window(options.window, (0, options.window_starts - 1) if options.window else (0, 0))
