"""Samples the rows of an evaluation."""

from __future__ import annotations

import dataclasses

from corl_jax.evaluation.suite import EvaluationInputs
from corl_jax.policies.turns import bind_sampler, sample_turn
from corl_jax.tasks import TASKS
from corl_jax.types import Prompts, Rollout


def sample_rows(
    inputs: EvaluationInputs, name: str, prompts: Prompts, num_rows: int | None = None
) -> Rollout:
    """Samples a completion of the task `name` for each prompt, filled up to `num_rows` rows."""
    policy, task = inputs.policy, TASKS[name]
    greedy = inputs.greedy_texts if task.makes_text else inputs.greedy_images
    options = dataclasses.replace(inputs.sampling, greedy=greedy)
    program = policy.family.turns[task.turn_kinds]
    return sample_turn(
        bind_sampler(program.sample, policy.config, options), policy.params,
        prompts.encoded[name], prompts.index, seed=inputs.seed, stream=task.stream,
        fill_to=num_rows, place=inputs.place,
    )  # fmt: skip
