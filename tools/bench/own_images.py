"""Measures the update of self-questioning: by reward, and supervised in two forms.

Each part is named after what `corl_jax.train` calls it: `self_qa` is the update of GRPO on images
and answers, `self_sft` learns true answers about own images, and `self_sft_through` lets their
gradient flow through the image into its codes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from corl_jax.algorithms.likelihoods import ROW_LIKELIHOOD
from corl_jax.policies.family import NOISE_KEYS, StraightThrough
from corl_jax.tasks import SELF_QUESTIONING, TASKS, name_segments
from corl_jax.train.step import TaskBatch, UpdateOptions
from tools.bench import inputs, training
from tools.bench.generation import make_prompts
from tools.bench.setting import Setting
from tools.bench.timing import Record

TASK = SELF_QUESTIONING[0]


def make_options(setting: Setting, name: str) -> UpdateOptions:
    """Returns the update options of a part."""
    options = training.make_update_options(setting)
    through = StraightThrough() if name == "self_sft_through" else None
    scoring = dataclasses.replace(
        options.logprobs,
        image=setting.size.family.stand_in_image(setting.size.policy),
        straight_through=through,
    )
    weights = tuple((segment, 1.0) for segment in name_segments(TASK, TASKS[TASK].segments))
    loss = options.loss if name == TASK else ROW_LIKELIHOOD
    return dataclasses.replace(options, logprobs=scoring, weights=weights, loss=loss)


def make_batch(setting: Setting) -> TaskBatch:
    """Returns images with noise for each, and answers about them, on the devices."""
    size, special = setting.size, setting.processor.special

    def complete(task: str, length: int) -> TaskBatch:
        prompts = make_prompts(setting, task)
        return inputs.make_task_batch(size, special, prompts, setting.group, length)

    image = complete("t2i", size.limits.image_tokens)
    answer = complete("mm2t", size.answer)
    question = dataclasses.replace(answer.prompts, pixel_values=None)
    keys = jax.random.split(jax.random.key(0), setting.completions)
    noise = {NOISE_KEYS: np.asarray(jax.random.key_data(keys))}
    codes = dataclasses.replace(image.segments[0], replay=noise)
    prompts = dataclasses.replace(image.prompts, next=question)
    segments = (codes, answer.segments[0])
    return setting.place(
        TaskBatch(prompts, segments, image.advantages, turns=TASKS[TASK].turn_kinds)
    )


def _measure(name: str, setting: Setting) -> Iterator[Record]:
    state, frozen, step = training.start_training(setting, make_options(setting, name))
    batch = {TASK: make_batch(setting)}

    def update() -> dict[str, jax.Array]:
        nonlocal state  # the step has taken over the buffers of the last one
        state, metrics = step(state, frozen, batch)
        return metrics

    timing = setting.measure(name, update)
    yield Record(name, "optimizer step", timing, {"loss": float(update()["loss"])})


RUNS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    name: functools.partial(_measure, name) for name in (TASK, "self_sft", "self_sft_through")
}
