"""Completes the block `algorithm` of a config by its recipe, and checks the two together."""

from __future__ import annotations

import dataclasses

from corl_jax.algorithms.recipes import RECIPES, Recipe
from corl_jax.config.checks import list_changes
from corl_jax.config.schema import Algorithm, Config


def complete_algorithm(algorithm: Algorithm) -> Algorithm:
    """Returns the block with the recipe's value for each option that is null."""
    recipe = RECIPES[algorithm.name]
    defaults = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(Recipe)
        if field.name in Algorithm.model_fields
    } | {"scale": recipe.scales[0]}
    missing = {name: x for name, x in defaults.items() if getattr(algorithm, name) is None}
    return algorithm.model_copy(update=missing)


def find_algorithm_problems(config: Config) -> list[str]:
    """Returns the options that the algorithm cannot work with, each with the reason."""
    chosen, recipe = config.algorithm, RECIPES[config.algorithm.name]
    algorithm, size = complete_algorithm(chosen), config.rollout.group_size
    problems = []
    if size < recipe.min_group_size:
        singles = ", ".join(name for name, row in RECIPES.items() if row.min_group_size <= size)
        problems.append(
            f"rollout.group_size: found {size}, but algorithm.name {chosen.name} compares the "
            f"completions of one prompt; expected at least {recipe.min_group_size}; raise it, or "
            f"choose {singles}"
        )
    if algorithm.redraws and size < 2:
        problems.append(
            f"algorithm.redraws: found {algorithm.redraws}, but with rollout.group_size {size} the "
            "rewards of a group never differ; set it to 0"
        )
    if algorithm.scale not in recipe.scales:
        problems.append(
            f"algorithm.scale: found {algorithm.scale}, which algorithm.name {chosen.name} does "
            f"not have; expected one of {', '.join(recipe.scales)}"
        )
    if recipe.max_iterations is not None and algorithm.num_iterations > recipe.max_iterations:
        problems.append(
            f"algorithm.num_iterations: found {algorithm.num_iterations}, but the loss of "
            f"algorithm.name {chosen.name} has no ratio that corrects for a policy that has moved; "
            f"expected {recipe.max_iterations}"
        )
    assert algorithm.clip_high is not None
    if algorithm.dual_clip is not None and algorithm.dual_clip <= 1 + algorithm.clip_high:
        problems.append(
            f"algorithm.dual_clip: found {algorithm.dual_clip:g}; expected more than 1 + "
            f"algorithm.clip_high, which is {1 + algorithm.clip_high:g}"
        )
    return problems


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
    if algorithm.kl_coef and algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        warnings.append(
            "algorithm.kl_estimator: k1 in the loss has a gradient whose mean is 0; choose k2 or "
            "k3, or set algorithm.kl_in to reward"
        )
    return warnings
