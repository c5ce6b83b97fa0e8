"""The stage `self_sft`: supervised fine-tuning on images that the model generates itself.

The model draws an image of each prompt, answers the question about it, and is scored as in
reinforcement learning. Then it learns the true answer of the row about its own image. It also
learns the codes of the images whose answer was right, because such an image shows what was asked.
In `self_sft` no gradient flows from an answer into its image, in `self_sft_through` it does, and
there the codes are learned only if `sft.t2i_weight` says so.

Source: showlab/UniRL (arXiv 2505.23380), detached and end to end; the loss of the images is ours.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.params import merge
from corl_jax.policies.family import NOISE_KEYS
from corl_jax.tasks import SELF_QUESTIONING, TASKS, name_segments
from corl_jax.train.drawn import Scored
from corl_jax.train.iteration import compare, describe, draw
from corl_jax.train.run import Run, put_batch
from corl_jax.train.sft import choose_image_weight, make_noise_bits, make_targets
from corl_jax.train.step import TaskBatch, TrainState
from corl_jax.types import Prompts, Rollout

TARGET_COLUMN = "qa_solution"


def weigh_segments(config: Config) -> dict[str, float]:
    """Returns the weight of the loss of images and of answers, by metric prefix."""
    (task,) = SELF_QUESTIONING
    image, answer = name_segments(task, TASKS[task].segments)
    return {image: choose_image_weight(config), answer: 1.0}


def self_sft_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """Returns (next state, Iteration) of one batch of prompts."""
    params = merge(state.params, run.frozen)
    drawn = draw(run, run.tasks, params, prompts, step)
    (task,) = run.tasks
    scored = drawn.scored[task]
    with run.phases("reward"):
        _, stats = compare(run, {task: scored.rewards})
    is_right = find_right_images(run, task, scored)
    with run.phases("update"):
        batch = make_batch(run, drawn.rollouts[task], prompts, is_right)
        state, metrics = run.train_step(state, run.frozen, {task: batch})
        jax.block_until_ready(metrics)
    # Reports show the weight of an image in the place of an advantage.
    weights = {task: put_batch(run, is_right.astype(np.float32))}
    stats[f"{task}/right_fraction"] = weights[task].mean()
    return state, describe(run, drawn, {task: scored.rewards}, [metrics], weights, stats)


def find_right_images(run: Run, task: str, scored: Scored) -> np.ndarray:
    """Returns [N] bool: whether every reward with a weight is 1, which says that all is right."""
    rewards = [scored.rewards[reward.name] for reward in run.rewards[task] if reward.weight]
    # NaN, where a reward does not apply, is not right.
    return np.all(np.stack(rewards) >= 1, axis=0)


def make_batch(run: Run, rollout: Rollout, prompts: Prompts, is_right: np.ndarray) -> TaskBatch:
    """Returns the sampled images, and the true answers in the place of the sampled ones."""
    codes, _ = rollout.segments
    # G = 2: [a0, a1] -> [a0, a0, a1, a1]
    answers = [text for text in prompts.columns[TARGET_COLUMN] for _ in range(rollout.group_size)]
    right_rows, targets = put_batch(run, (is_right, make_targets(run, answers)))
    # Noise of its own, apart from that of sampling, which the chosen codes depend on.
    bits = make_noise_bits(run, prompts, rollout.group_size)
    codes = dataclasses.replace(
        codes, mask=codes.mask & right_rows[:, None], logprobs=None,
        replay=codes.replay | {NOISE_KEYS: bits},
    )  # fmt: skip
    (task,) = run.tasks
    return TaskBatch(rollout.prompts, (codes, targets), turns=TASKS[task].turn_kinds)
